# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from functools import partial

import pytest
import torch

from singlepass.bench import registry
from singlepass.bench.optim import cases as optim
from singlepass.bench.optim import models, peers, python_op
from singlepass.bench.optim.steps import gate, prepare
from singlepass.bench.registry import COLUMNS, Pass

CPU = torch.device("cpu")

# Bytes per parameter of a step that moves nothing twice: parameters, gradients and previous gradients in the dtype,
# moments in float32. LAMB reads gradients once more for their global norm.
BYTES = {
    "AdamW": (28, 22),
    "Lion": (20, 14),
    "AdaBelief": (28, 22),
    "Adan": (44, 34),
    "DiffGrad": (36, 26),
    "LAMB": (44, 34),
    "LARS": (28, 18),
    "SGDSaI": (20, 14),
}


@pytest.mark.parametrize("rule", optim.RULES, ids=lambda rule: rule.name)
def test_traffic(rule: optim.Rule) -> None:
    for dtype, expected in zip((torch.float32, torch.bfloat16), BYTES[rule.name], strict=True):
        assert sum(p.bytes for p in rule.traffic(1000, dtype)) == 1000 * expected


def test_pass_counts_updates_twice() -> None:
    assert Pass(reads=(3,), updates=(5, 7)).bytes == 3 + 2 * 12


@pytest.mark.parametrize(
    ("model", "tensors", "elements"),
    [
        (models.GPT2_SMALL, 148, 124_439_808),
        (models.VIT_B16, 152, 86_567_656),
        (models.MANY_SMALL, 1000, 1_000_000),
        (models.ONE_ELEMENT, 300, 300),
        (models.TENSORS_300, 300, 122_880_000),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_models_have_the_published_sizes(model: models.Model, tensors: int, elements: int) -> None:
    assert (len(model.shapes), model.elements) == (tensors, elements)


def test_every_optimizer_has_a_case() -> None:
    import singlepass.optim

    found = {case.op for case in registry.cases(CPU) if case.family == "optim"}
    assert found == set(singlepass.optim._OPTIMIZERS) == set(BYTES)


def test_every_op_is_measured() -> None:
    from singlepass._ops import OPS

    measured = {op for case in registry.cases(CPU) for op in case.ops}
    # The floor itself, and the kernel of grad_norm, which stops at its sum.
    assert measured | {"stream_", "grad_squares"} == set(OPS)


def test_cases_are_told_apart() -> None:
    cases = list(registry.cases(CPU))
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    for case in cases:
        providers = [p.name for p in case.providers]
        assert len(set(providers)) == len(providers)
        assert {p.column for p in case.providers} <= set(COLUMNS)
        assert "native" in providers
        assert {"eager", "sdpa"} & set(providers), "a whole model is compared with an uncompressed cache alone"


def adamw_step(params: list[torch.nn.Parameter], **changes: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, **({"lr": 1e-3, "weight_decay": 1e-2} | changes))


def adamw_gate(**changes: object) -> registry.Gate:
    reference = optim.own(optim.RULES[0], "eager")
    return gate(partial(adamw_step, **changes), reference, torch.float32, lambda optimizer: optimizer.step, CPU)


def test_gate_passes_the_same_formula() -> None:
    assert adamw_gate().agrees


@pytest.mark.parametrize(
    "changes", [{"weight_decay": 0.0}, {"eps": 1e-6}, {"betas": (0.9, 0.99)}, {"amsgrad": True}], ids=str
)
def test_gate_stops_another_formula(changes: dict[str, object]) -> None:
    assert not adamw_gate(**changes).agrees


def test_gate_stops_nan() -> None:
    assert not adamw_gate(lr=float("inf")).agrees


@pytest.mark.parametrize(
    "case",
    [c for c in registry.cases(CPU) if c.size in ("1000x1000", "300x1")],
    ids=lambda case: f"{case.op}-{case.size}",
)
def test_providers_compute_what_they_claim(case: registry.Case) -> None:
    """Ours, torch's and the peers agree with the reference, except where it is said how they differ."""
    for provider in case.providers:
        if provider.why_not(CPU) is None:
            assert provider.gate(CPU).agrees or provider.differs, provider.name


def test_the_op_in_python_takes_the_lists_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Tensor, ...]] = []
    monkeypatch.setattr(python_op, "nothing", lambda *lists, **_: seen.append(lists))
    python_op.library.cache_clear()
    data = optim.inputs(models.Model("small", "", ((1,), (2, 3))), torch.float32, CPU)
    step = python_op.prepare(data)
    for i in range(2):
        step.before(i)
        step.run()
    for (params, grads, first, second, maximum, steps, _), expected in zip(seen, data.grads, strict=True):
        assert all(a is b for a, b in zip(grads, expected, strict=True))
        assert not maximum
        assert [t.shape for t in params] == [t.shape for t in first] == [t.shape for t in second] == [(1,), (2, 3)]
        assert [t.shape for t in steps] == [(), ()]
    python_op.library.cache_clear()


def test_missing_peer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = list(peers.peers("Adan", {}))
    assert found
    assert {peer.why_not(CPU) for peer in found} == {"not installed"}


def test_gradients_alternate_and_inputs_stay() -> None:
    model = models.Model("small", "", ((3, 4), (5,)))
    data = optim.inputs(model, torch.float32, CPU)
    before = [p.clone() for p in data.params]
    step = prepare(adamw_step, data)
    for i in range(4):
        step.before(i)
        assert all(p.grad is g for p, g in zip(step.params, data.grads[i % 2], strict=True))
        step.run()
    assert all(torch.equal(a, b) for a, b in zip(before, data.params, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, step.params, strict=True))


@pytest.mark.parametrize("rule", optim.RULES, ids=lambda rule: rule.name)
def test_bfloat16_parameters_pass_with_float32_states(rule: optim.Rule) -> None:
    providers = {p.name: p for p in optim.providers(rule, models.GPT2_SMALL, torch.bfloat16)}
    for provider in (providers["eager"], providers["native"]):
        if provider.why_not(CPU) is None:
            assert provider.gate(CPU).agrees, provider.name


@pytest.mark.inductor
@pytest.mark.deep("torch.compile of a step of 148 tensors: half a minute")
def test_compiled_reference_agrees() -> None:
    case = next(c for c in registry.cases(CPU) if c.op == "LAMB" and c.size == "gpt2-small")
    compiled = {p.name: p for p in case.providers}["compile"]
    assert compiled.gate(CPU).agrees
