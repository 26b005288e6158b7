# SPDX-License-Identifier: Apache-2.0
"""An op is complete when it has everything below. A new op fails here until it has."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._library.simple_registry import singleton

from singlepass import _dispatch
from singlepass._ops import NAMESPACE, op

from .kv import test_attention as test_attention_kv
from .kv import test_compile as test_compile_kv
from .kv import test_functional as test_functional_kv
from .kv import test_saliency as test_saliency_kv
from .optim import test_compile, test_grad_norm, test_rules, test_stream
from .optim.steps import rule_of
from .rational import test_compile as test_compile_rational
from .rational import test_functional
from .simt.truth import CASES
from .spectral import test_compile as test_compile_spectral
from .spectral import test_ops as test_ops_spectral

README = Path(__file__).parents[1] / "README.md"

# What runs over the cases runs for every op that has one.
_STEPS = {rule_of(case).op_name for case in CASES}

FLOAT64_TESTS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(_STEPS, test_rules.test_ten_steps_in_every_mix_of_dtypes),
    "grad_norm": test_grad_norm.test_norm_and_divisor,
    "kv_decode": test_attention_kv.test_against_float64,
    "kv_dequantize_": test_functional_kv.test_against_float64,
    "kv_quantize_": test_functional_kv.test_against_float64,
    "kv_saliency": test_saliency_kv.test_against_float64,
    "rational": test_functional.test_against_float64,
    "rational_backward": test_functional.test_against_float64,
    "lorentz": test_ops_spectral.test_lorentz,
    "lorentz_backward": test_ops_spectral.test_lorentz,
    "spectral_sample": test_ops_spectral.test_draws_follow_the_distribution,
    "spectral_scale_": test_ops_spectral.test_scale,
    "spectral_step_": test_ops_spectral.test_step,
    "spectral_swap_": test_ops_spectral.test_swap,
    "stream_": test_stream.test_values_stay,
}
OPCHECKS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(_STEPS, test_compile.test_step_ops_pass_opcheck),
    "grad_norm": test_compile.test_grad_norm_passes_opcheck,
    "kv_decode": test_compile_kv.test_decode_op_passes_opcheck,
    "kv_dequantize_": test_compile_kv.test_codec_ops_pass_opcheck,
    "kv_quantize_": test_compile_kv.test_codec_ops_pass_opcheck,
    "kv_saliency": test_compile_kv.test_saliency_op_passes_opcheck,
    "rational": test_compile_rational.test_ops_pass_opcheck,
    "rational_backward": test_compile_rational.test_ops_pass_opcheck,
    **dict.fromkeys(
        ("lorentz", "lorentz_backward", "spectral_sample", "spectral_scale_", "spectral_step_", "spectral_swap_"),
        test_compile_spectral.test_ops_pass_opcheck,
    ),
    "stream_": test_compile.test_stream_passes_opcheck,
}
# Of the ops that have a backward op.
GRADIENT_TESTS: dict[str, Callable[..., None]] = {
    "lorentz": test_ops_spectral.test_lorentz_gradients_in_float64,
    "rational": test_functional.test_gradcheck,
}

# Measured inside the steps that use it; and the op that measures the others.
MEASURED_WITHIN = {"grad_norm": "lamb_step_"}
YARDSTICK = "stream_"


def registered() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix(f"{NAMESPACE}::") for name in names if name.startswith(f"{NAMESPACE}::"))


each_op = pytest.mark.parametrize("name", registered())


def has_kernel(name: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key))


def test_the_dispatcher_knows_all_ops() -> None:
    assert sorted(_dispatch.ops()) == registered()


@each_op
def test_schema(name: str) -> None:
    schema = op(name)._schema
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
    reference = _dispatch.implementation(name, "eager")
    assert reference.__module__.startswith("singlepass.reference")
    assert reference.__doc__
    assert has_kernel(name, "CompositeExplicitAutograd"), "the reference is the fallback on every device"


@each_op
def test_fast_implementation(name: str) -> None:
    assert has_kernel(name, "CPU"), "the native CPU library has no kernel for it"


@each_op
def test_compared_with_float64(name: str) -> None:
    assert callable(FLOAT64_TESTS.get(name)), f"no test compares {name} with float64"


@each_op
def test_opcheck(name: str) -> None:
    assert callable(OPCHECKS.get(name)), f"no test runs torch.library.opcheck on {name}"


@each_op
def test_gradients(name: str) -> None:
    if f"{name}_backward" in registered():
        assert callable(GRADIENT_TESTS.get(name)), f"{name} can be differentiated, and no test checks its gradient"


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
def test_row_in_the_support_table(name: str) -> None:
    (header,) = re.findall(r"^\| op \|.*\|$", README.read_text(), re.MULTILINE)
    rows = re.findall(rf"^\| `{re.escape(name)}` \|.*\|$", README.read_text(), re.MULTILINE)
    assert len(rows) == 1, f"README.md: expected one row for `{name}`; got {len(rows)}"
    cells = dict(zip(header.split("|"), rows[0].split("|"), strict=True))
    assert all(cell.strip() for cell in list(cells.values())[1:-1])
    triton = {key.strip(): cell.strip() for key, cell in cells.items()}["Triton"]
    assert (triton == "no") == (_dispatch.rejection(name, "triton", "cuda") == "there is no Triton kernel for this op")
