# SPDX-License-Identifier: Apache-2.0
"""Orthogonal bases of a model's keys and values, and how many of their directions a cache keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..._errors import message, require
from ..._ops.kv import MAX_HEAD_DIM

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.modeling_utils import PreTrainedModel

STEP = 16  # ranks are multiples of it: what a tensor core multiplies at a time
_OP = "MatryoshkaBases"
MARK = "singlepass_folded_values"  # in a model's config: which bases its weights hold
_FORMAT = "singlepass.matryoshka.1"


class Ranks(NamedTuple):
    """How many directions of each KV head a cache keeps, multiples of 16.

    Attributes:
        keys: of the keys, int64 (heads,).
        values: of the values, int64 (heads,).
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, repr=False, eq=False)
class MatryoshkaBases:
    """Orthogonal bases of the keys and values of a model, the result of :func:`fit_matryoshka`. The first r directions
    of a basis are the best r to keep, so that one set of bases serves every budget.

    Attributes:
        keys: by number of the layer, orthogonal matrices float32 (heads, head_dim, head_dim), a basis in the columns
            of each, for keys after rotary embedding.
        values: likewise for values.
        model: what the model is, in words; a cache refuses bases of another one.
        sample: one element of each of the model's parameters, float32, by which two models of one kind are told apart.
        ranks: what :func:`search_ranks` found, by budget and by number of the layer.
        folded: a mark of the bases that :func:`fold_values` has put into the model's weights, or None.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from singlepass.kv import fit_matryoshka
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        ...                      num_key_value_heads=2, head_dim=32, vocab_size=32)
        >>> fit_matryoshka(LlamaForCausalLM(config), [torch.arange(32)[None]], progress=False)
        MatryoshkaBases(llama of 2 layers with 2 KV heads of 32, searched=[])
    """

    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    model: str
    sample: Tensor
    ranks: Mapping[float, Mapping[int, Ranks]] = field(default_factory=dict)
    folded: str | None = None

    def __post_init__(self) -> None:
        same = len(self.keys) > 0 and set(self.keys) == set(self.values)
        got = f"{sorted(self.keys)} and {sorted(self.values)}"
        require(same, _OP, "keys and values of the same layers", got, "Call fit_matryoshka.")
        for name in ("keys", "values"):
            for layer, matrices in getattr(self, name).items():
                check_bases(_OP, f"{name} of layer {layer}", matrices)

    def __repr__(self) -> str:
        first = next(iter(self.keys.values()))
        kind = (
            f"{self.model.split(',')[0]} of {len(self.keys)} layers with {first.shape[0]} KV heads of {first.shape[1]}"
        )
        return f"MatryoshkaBases({kind}, searched={sorted(self.ranks)})"

    @property
    def nbytes(self) -> int:
        """Bytes of all bases."""
        return sum(basis.nbytes for bases in (self.keys, self.values) for basis in bases.values())

    def ranks_of(self, budget: float) -> Mapping[int, Ranks]:
        """The ranks that keep at most a fraction of all: those that were searched for this budget, else the same in
        all layers and heads, where values have 16 more than keys if the number is odd.

        Raises:
            ValueError: a budget out of (0, 1], or too small to keep anything.
        """
        check_budget(_OP, budget)
        found = self.ranks.get(key_of(budget))
        if found is not None:
            return found
        return {layer: _uniform(budget, self.keys[layer], self.values[layer]) for layer in self.keys}

    def check_config(self, where: str, config: PreTrainedConfig) -> None:
        """Raises unless they are bases of such a model."""
        its = describe(config)
        require(self.model == its, where, f"bases of this model ({its})", f"bases of {self.model}", "Fit them for it.")
        mark = getattr(config.get_text_config(decoder=True), MARK, None)
        kinds = ["bases of values in the model's weights" if m else "bases that are not" for m in (mark, self.folded)]
        remedy = "Use the model and the bases that fold_values returned together, or neither."
        contract = kinds[0] if mark is None or self.folded is None else f"the bases in the model's weights ({mark})"
        require(mark == self.folded, where, contract, kinds[1], remedy)

    def check_model(self, where: str, model: PreTrainedModel) -> None:
        """Raises unless they are bases of this model. Another dtype is no other model."""
        self.check_config(where, text_config(model))
        its = sample_of(model)
        same = its.shape == self.sample.shape and torch.allclose(its, self.sample, rtol=2.0**-6, atol=1e-3)
        contract = f"bases of this model ({self.model})"
        require(same, where, contract, "bases of a model with other weights", "Fit them for it.")

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a safetensors file."""
        tensors = {"sample": self.sample.contiguous()}
        for name, bases in (("keys", self.keys), ("values", self.values)):
            tensors |= {f"{name}.{layer}": basis.contiguous() for layer, basis in bases.items()}
        for budget, layers in self.ranks.items():
            for layer, ranks in layers.items():
                for name, its in zip(Ranks._fields, ranks, strict=True):
                    tensors[f"ranks.{budget!r}.{name}.{layer}"] = its.clone()
        from safetensors.torch import save_file  # comes with transformers

        save_file(tensors, path, metadata={"format": _FORMAT, "about": json.dumps([self.model, self.folded])})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> MatryoshkaBases:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: any other file, or a part of one.
        """
        where, remedy = f"{_OP}.load", "Pass a file that save() wrote."
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(message(where, "a file", path, remedy))
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(message(where, "a whole file", error, remedy)) from error
        require(metadata.get("format") == _FORMAT, where, f"a file of {_FORMAT}", metadata, remedy)
        try:
            return cls._of(tensors, metadata)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # whatever else may be in it
            raise ValueError(message(where, "a whole file", f"{type(error).__name__}: {error}", remedy)) from error

    @classmethod
    def _of(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> MatryoshkaBases:
        """The bases of a file's contents."""
        parts: dict[str, dict[int, Tensor]] = {"keys": {}, "values": {}}
        found: dict[float, dict[int, dict[str, Tensor]]] = {}
        for name, tensor in tensors.items():
            head, *rest = name.split(".")
            if head in parts:
                parts[head][int(rest[0])] = tensor
            elif head == "ranks":
                budget = ".".join(rest[:-2])
                found.setdefault(float(budget), {}).setdefault(int(rest[-1]), {})[rest[-2]] = tensor
        keys, values = (dict(sorted(parts[name].items())) for name in ("keys", "values"))
        model, folded = json.loads(metadata["about"])
        bases = cls(keys, values, model, tensors["sample"], folded=folded)
        ranks = {b: {i: Ranks(**its) for i, its in sorted(layers.items())} for b, layers in sorted(found.items())}
        for layers in ranks.values():
            for layer, its in layers.items():
                for name, one, matrices in zip(Ranks._fields, its, (keys[layer], values[layer]), strict=True):
                    check_ranks(_OP, one, name, len(matrices), matrices.shape[1])
        return replace(bases, ranks=ranks)


def check_bases(where: str, name: str, bases: Tensor) -> None:
    """Raises unless they are orthogonal matrices of a layer's heads."""
    require(isinstance(bases, Tensor), where, f"a tensor {name}", type(bases).__name__, "Call fit_matryoshka.")
    square = bases.dim() == 3 and bases.shape[1] == bases.shape[2] and bases.shape[1] % STEP == 0
    square = square and 0 < bases.shape[1] <= MAX_HEAD_DIM and bases.is_floating_point() and bases.shape[0] > 0
    contract = f"{name} (heads, channels, channels) of 16, 32, ..., {MAX_HEAD_DIM} channels"
    require(square, where, contract, f"{tuple(bases.shape)} of {bases.dtype}", "Pass one matrix for each KV head.")
    whole = bases.detach().double()
    off = (whole.mT @ whole - torch.eye(bases.shape[1], dtype=torch.float64, device=bases.device)).abs().amax()
    require(bool(off < 1e-3), where, f"orthogonal {name}", f"U^T U - I up to {off:.2g}", "Call fit_matryoshka.")


def check_budget(where: str, budget: float) -> None:
    fits = isinstance(budget, Real) and 0.0 < float(budget) <= 1.0
    require(fits, where, "a budget over 0, up to 1", repr(budget), "It is the fraction of the ranks to keep.")


def key_of(budget: float) -> float:
    """By which ranks for a budget are found: the same for numbers that differ by their roundings."""
    return round(float(budget), 6)


def _uniform(budget: float, keys: Tensor, values: Tensor) -> Ranks:
    """Equal ranks of all heads whose bases these are."""
    (heads, most, _), most_of_values = keys.shape, values.shape[1]
    steps = int(budget * (most + most_of_values) / STEP + 1e-6)
    least = 2 * STEP / (most + most_of_values)
    require(steps >= 2, _OP, f"a budget of {least} or more for heads of {most}", budget, "Each keeps 16 at least.")
    of_keys = min(max(steps // 2, steps - most_of_values // STEP), most // STEP)
    full = (
        torch.full((heads,), STEP * n, device="cpu") for n in (of_keys, min(steps - of_keys, most_of_values // STEP))
    )
    return Ranks(*full)


def check_ranks(where: str, ranks: Any, name: str, heads: int, most: int) -> Tensor:
    """Ranks of one layer's heads, int64 (heads,), if they are."""
    try:
        its = torch.as_tensor(ranks, device="cpu")
    except (RuntimeError, TypeError, ValueError):
        its = torch.empty(0, device="cpu")
    its = its.expand(heads) if its.dim() == 0 else its
    fits = its.shape == (heads,) and its.dtype in (torch.int64, torch.int32)
    fits = fits and bool(((its % STEP == 0) & (its >= STEP) & (its <= most)).all())
    contract = f"{heads} ranks of {name} among 16, 32, ..., {most}"
    require(fits, where, contract, ranks, "Ranks are multiples of 16; or pass a budget.")
    return its.long().clone()


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """That of a model's text decoder."""
    return model.config.get_text_config(decoder=True)


def describe(config: PreTrainedConfig) -> str:
    """What a model is, as far as its bases depend on it."""
    decoder = config.get_text_config(decoder=True)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    parts = [f"{name}={getattr(decoder, name, None)}" for name in names]
    rope = getattr(decoder, "rope_parameters", None)
    return ", ".join([decoder.model_type, *parts, f"rope_parameters={json.dumps(rope, sort_keys=True, default=str)}"])


def sample_of(model: PreTrainedModel) -> Tensor:
    """One element of each floating-point parameter, float32, in the order of their names."""
    parameters = sorted(model.named_parameters())
    found = [p.detach().flatten()[p.numel() // 2].float().cpu() for _, p in parameters if p.is_floating_point()]
    return torch.stack(found) if found else torch.empty(0)
