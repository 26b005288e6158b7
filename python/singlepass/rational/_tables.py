# SPDX-License-Identifier: Apache-2.0
"""Tables of initial coefficients of rational activations, with their form and error.

``tables.json`` is written by ``python -m singlepass.rational._make_tables``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._errors import require
from .._ops.rational import FORMS, MAX_DEGREES
from ..reference.rational import rational as _rational

FILE = Path(__file__).with_name("tables.json")

TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "geglu": lambda x: x * F.gelu(x),  # a gated unit whose gate is its own input, as KAT's tables have it
    "gelu": F.gelu,
    "identity": lambda x: x,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # OpenAI's CLIP
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swiglu": lambda x: x * F.silu(x),
    "tanh": torch.tanh,
}

_OTHER_NAMES = {"swish": "silu", "swishglu": "swiglu"}  # KAT's

_NORMAL_REACH = 12.0  # beyond it, polynomials of any degree here times the normal density are below float64's rounding
_NORMAL_POINTS = 2**15 + 1


@dataclass(frozen=True, repr=False)
class Table:
    """Coefficients of one rational function. Calling it with a tensor evaluates the function in plain PyTorch.

    Attributes:
        numerator: a_0 to a_m.
        denominator: b_1 to b_n; in form C b_0 to b_n.
        form: "A", "B" or "C", as in :func:`singlepass.functional.rational`. They are valid in this form only.
        interval: where it approximates its target; None if it was not fitted.
        max_error: the largest absolute error there; None if it was not fitted.
        second_moment: E[f(z)^2] for a standard normal z.

    Example:
        >>> import torch
        >>> from singlepass.nn import table
        >>> gelu = table("gelu")
        >>> error = gelu(torch.linspace(-3, 3, 101)) - torch.nn.functional.gelu(torch.linspace(-3, 3, 101))
        >>> bool(error.abs().max() < gelu.max_error + 1e-6)
        True
        >>> gelu
        Table(form='A', degrees=(5, 4), interval=(-8.0, 8.0), max_error=0.0034)
    """

    numerator: tuple[float, ...]
    denominator: tuple[float, ...]
    form: str
    interval: tuple[float, float] | None
    max_error: float | None
    second_moment: float

    @classmethod
    def of(cls, numerator: Sequence[float], denominator: Sequence[float], form: str) -> Table:
        """A table of given coefficients, the lowest degree first."""
        a, b = tuple(map(float, numerator)), tuple(map(float, denominator))
        return cls(a, b, form, None, None, second_moment(a, b, form))

    @property
    def degrees(self) -> tuple[int, int]:
        """Of numerator and denominator."""
        return len(self.numerator) - 1, len(self.denominator) - (self.form == "C")

    @property
    def gain(self) -> float:
        """1 / E[f(z)^2], the factor for the weight variance of the next layer that preserves variance."""
        return 1.0 / self.second_moment if self.second_moment > 0.0 else 1.0

    def __repr__(self) -> str:
        fitted = "" if self.max_error is None else f", interval={self.interval}, max_error={self.max_error:.2g}"
        return f"Table(form={self.form!r}, degrees={self.degrees}{fitted})"

    def __call__(self, x: Tensor) -> Tensor:
        return evaluate(x, self.numerator, self.denominator, self.form)


def evaluate(x: Tensor, numerator: Sequence[float], denominator: Sequence[float], form: str) -> Tensor:
    """The rational function of x, any shape, in eager PyTorch and in x's dtype (arithmetic at least float32)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    a, b = (torch.tensor([list(c)], dtype=dtype, device=x.device) for c in (numerator, denominator))
    return _rational(x.reshape(-1, 1), a, b, None, None, form=FORMS.index(form), channel_dim=-1).reshape(x.shape)


def second_moment(numerator: Sequence[float], denominator: Sequence[float], form: str) -> float:
    """E[f(z)^2] for a standard normal z, to about 1e-8: the trapezoidal rule, whose error only kinks of |v| cause."""
    z = torch.linspace(-_NORMAL_REACH, _NORMAL_REACH, _NORMAL_POINTS, dtype=torch.float64, device="cpu")
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2.0 * math.pi)
    return float(torch.trapezoid(evaluate(z, numerator, denominator, form).square() * density, z))


def fitted_form(form: str) -> str:
    """The form whose tables serve ``form``: D is B with noise."""
    return "B" if form == "D" else form


def check_form(where: str, form: str, degrees: tuple[int, int]) -> None:
    require(form in (*FORMS,), where, "form A, B, C or D", repr(form), "Choose one of them.")
    pair = isinstance(degrees, (tuple, list)) and len(degrees) == 2
    fits = pair and all(isinstance(d, Integral) and 1 <= d <= m for d, m in zip(degrees, MAX_DEGREES, strict=True))
    contract = f"degrees (m, n) with m from 1 to {MAX_DEGREES[0]} and n from 1 to {MAX_DEGREES[1]}"
    require(fits, where, contract, degrees, "They are the degrees of numerator and denominator.")


def dump(tables: dict[tuple[str, str], Table]) -> str:
    """JSON, one table per line."""
    lines = [json.dumps({"name": name, **asdict(entry)}) for (name, _), entry in sorted(tables.items())]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def load(text: str) -> dict[tuple[str, str, tuple[int, int]], Table]:
    """Tables by name, form and degrees, from what :func:`dump` wrote."""
    tables = {}
    for fields in json.loads(text):
        name = fields.pop("name")
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
        entry = Table(**values)
        tables[name, entry.form, entry.degrees] = entry
    return tables


@cache
def shipped() -> dict[tuple[str, str, tuple[int, int]], Table]:
    """All tables of the package, by name, form and degrees."""
    return load(FILE.read_text(encoding="utf-8"))


def _identity(form: str, degrees: tuple[int, int]) -> Table:
    """The identity holds in every form and degree: the shipped one, with more zeros or fewer."""
    base = next(entry for (name, f, _), entry in shipped().items() if name == "identity" and f == form)
    constants = 1 if form == "C" else 0
    numerator = base.numerator[:2] + (0.0,) * (degrees[0] - 1)
    denominator = base.denominator[:constants] + (0.0,) * degrees[1]
    return Table(numerator, denominator, form, base.interval, base.max_error, base.second_moment)


def table(name: str, form: str = "A", degrees: tuple[int, int] = (5, 4)) -> Table:
    """An installed table, fitted by :func:`fit_rational` on [-3, 3], "gelu" and "quick_gelu" on [-8, 8].

    Each form has its own tables, because coefficients fitted for one form give another function in another form. KAT's
    "gelu", for example, was fitted for form B; KAT's kernels evaluate it in form A, where it is off by 1.46.

    Args:
        name: "geglu" (x gelu(x)), "gelu", "identity", "leaky_relu" (slope 0.01), "mish", "quick_gelu"
            (x sigmoid(1.702 x)), "relu", "relu_squared", "sigmoid", "silu", "swiglu" (x silu(x)) or "tanh".
        form: "A", "B", "C" or "D" (uses B's).
        degrees: of numerator and denominator: (5, 4); any for the identity.

    Raises:
        ValueError: an unknown name, or no such table in this form and these degrees.

    Example:
        >>> from singlepass.nn import table
        >>> table("relu", "B").max_error < 0.02
        True
    """
    check_form("table", form, degrees)
    tables, names = shipped(), sorted({key[0] for key in shipped()})
    meant = {n.replace("_", ""): n for n in names} | _OTHER_NAMES
    close = meant.get(str(name).lower().replace("_", ""))
    remedy = f"Write {close!r}." if close else "Fit one by singlepass.nn.fit_rational."
    require(name in names, "table", f"a name among {', '.join(names)}", repr(name), remedy)
    key = (name, fitted_form(form), (degrees[0], degrees[1]))
    if key not in tables and name == "identity":
        return _identity(key[1], key[2])
    held = " or ".join(str(d) for n, f, d in sorted(tables) if (n, f) == key[:2])
    remedy = f"Fit one by singlepass.nn.fit_rational(fn, {form!r}, {key[2]}) and pass it as init."
    require(key in tables, "table", f"degrees {held} for {name!r}", key[2], remedy)
    return tables[key]


def _are_finite(values: Any) -> bool:
    try:
        return all(math.isfinite(value) for value in values)
    except (TypeError, ValueError, RuntimeError):  # not a sequence, or one of sequences
        return False


def resolve(
    where: str, init: str | Table | tuple[Sequence[float], Sequence[float]], form: str, degrees: tuple[int, int]
) -> Table:
    """The table that the argument ``init`` of a module stands for."""
    check_form(where, form, degrees)
    if isinstance(init, str):
        return table(init, form, degrees)
    if not isinstance(init, Table):
        fits = isinstance(init, (tuple, list)) and len(init) == 2
        fits = fits and all(_are_finite(values) for values in init)
        contract = "init as a name, a Table or a pair (numerator, denominator) of finite numbers"
        require(fits, where, contract, init, "Name one of singlepass.nn.table's.")
        counts = (len(init[0]), len(init[1]))
        wanted = (degrees[0] + 1, degrees[1] + (form == "C"))
        contract = f"{wanted[0]} and {wanted[1]} coefficients for form {form} and degrees {degrees}"
        require(counts == wanted, where, contract, f"{counts[0]} and {counts[1]}", "Pass the degrees that they have.")
        return Table.of(init[0], init[1], fitted_form(form))
    got = f"one for form {init.form} and degrees {init.degrees}"
    contract = f"a table for form {fitted_form(form)} and degrees {degrees}"
    require(
        init.form == fitted_form(form) and init.degrees == tuple(degrees), where, contract, got, "Fit it for these."
    )
    return init
