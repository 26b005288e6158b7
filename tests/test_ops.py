# SPDX-License-Identifier: Apache-2.0
"""An op is complete when it has everything below. A new op fails here until it has."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch._library.simple_registry import singleton
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from singlepass._ops import OPS
from singlepass._ops.op import NAMESPACE
from singlepass._ops.optim import RULES

from .counting.traffic_table import ROWS
from .kv import samples as kv
from .optim import samples as optim
from .rational import samples as rational
from .spectral import samples as spectral

README = Path(__file__).parents[1] / "README.md"

FAMILIES = {"kv": kv, "optim": optim, "rational": rational, "spectral": spectral}

# Measured inside what uses it; and the op that measures the others.
MEASURED_WITHIN = {
    "grad_norm": "lamb_step_",
    "grad_squares": "lamb_step_",
    "kv_project_": "low_rank_append",
    "kv_step_": "next_token",
}
YARDSTICK = "stream_"


def registered() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    ours = {name.removeprefix(f"{NAMESPACE}::") for name in names if name.startswith(f"{NAMESPACE}::")}
    return sorted(ours - {f"{rule.name}.at" for rule in RULES.values()})


each_op = pytest.mark.parametrize("name", registered())


def has_kernel(name: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key))


def test_the_dispatcher_knows_all_ops() -> None:
    assert sorted(OPS) == registered()


@each_op
def test_schema(name: str) -> None:
    schema = OPS[name].overload._schema
    assert [r.alias_info for r in schema.returns] == [None] * len(schema.returns)
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert bool(written) == name.endswith("_"), "in-place ops, and only they, end in an underscore"
    for argument in schema.arguments:
        kind = str(argument.type)
        if kind in ("Tensor", "List[Tensor]"):
            assert not argument.kwarg_only, "tensors by position"
        elif kind != "Optional[Tensor]":
            assert argument.kwarg_only, "everything else by keyword"


@each_op
def test_fake(name: str) -> None:
    assert singleton.find(f"{NAMESPACE}::{name}").fake_impl.kernel is not None


@each_op
def test_reference(name: str) -> None:
    reference = OPS[name].on("eager")
    assert reference.__module__.startswith("singlepass.reference")
    assert reference.__doc__
    assert has_kernel(name, "CompositeExplicitAutograd"), "the reference is the fallback on every device"


@each_op
def test_fast_implementation(name: str) -> None:
    assert has_kernel(name, "CPU"), "the native CPU library has no kernel for it"


@each_op
def test_compared_with_float64(name: str) -> None:
    family = FAMILIES[OPS[name].family]
    assert callable(family.FLOAT64.get(OPS[name])), f"no test compares {name} with float64"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@each_op
def test_opcheck(name: str, device: str) -> None:
    op = OPS[name]
    samples = [sample for sample in FAMILIES[op.family].samples(device) if sample.op is op]
    assert samples, f"tests/{op.family}/samples.py has no arguments for {name}"
    for sample in samples:
        torch.library.opcheck(op.overload, sample.arguments, sample.options)


@each_op
def test_memory_that_was_freed_is_refused(name: str) -> None:
    """By native ops, as sharding frees what it has gathered: of each tensor in turn."""
    op = OPS[name]
    for sample in (sample for sample in FAMILIES[op.family].samples("cpu") if sample.op is op):
        for i in range(len(tree_leaves((sample.arguments, sample.options)))):
            leaves, spec = tree_flatten((sample.arguments, sample.options))
            leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            if not isinstance(leaves[i], torch.Tensor) or leaves[i].numel() == 0:
                continue
            arguments, options = tree_unflatten(leaves, spec)
            leaves[i].untyped_storage().resize_(0)
            with pytest.raises(RuntimeError, match=f"^{name}: expected .* whose memory was freed"):
                op.overload(*arguments, **options)


@each_op
def test_gradients(name: str) -> None:
    if f"{name}_backward" in registered():
        tests = FAMILIES[OPS[name].family].GRADIENTS
        assert callable(tests.get(OPS[name])), f"{name} can be differentiated, and no test checks its gradient"


@each_op
def test_benchmark_case(name: str) -> None:
    for extra in ("matplotlib", "rich"):
        if importlib.util.find_spec(extra) is None:
            pytest.skip(f"the bench extra is not installed: no {extra}")
    from singlepass.bench import floor, registry

    if name == YARDSTICK:
        assert "stream_" in Path(floor.__file__).read_text()
        return
    cases = registry.cases(torch.device("cpu"))
    measured = {f"{case.op.lower()}_step_" if case.family == "optim" else case.op for case in cases}
    assert MEASURED_WITHIN.get(name, name) in measured


@each_op
def test_counted_traffic(name: str) -> None:
    family = OPS[name].family
    assert any(row.op is OPS[name] for row in ROWS), f"tests/{family}/traffic.py has no row for {name}"


@each_op
def test_row_in_the_support_table(name: str) -> None:
    (header,) = re.findall(r"^\| op \|.*\|$", README.read_text(), re.MULTILINE)
    rows = re.findall(rf"^\| `{re.escape(name)}` \|.*\|$", README.read_text(), re.MULTILINE)
    assert len(rows) == 1, f"README.md: expected one row for `{name}`; got {len(rows)}"
    cells = dict(zip(header.split("|"), rows[0].split("|"), strict=True))
    assert all(cell.strip() for cell in list(cells.values())[1:-1])
    triton = {key.strip(): cell.strip() for key, cell in cells.items()}["Triton"]
    assert (triton == "no") == (not OPS[name].has_triton)
