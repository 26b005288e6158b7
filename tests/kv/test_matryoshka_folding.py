# SPDX-License-Identifier: Apache-2.0
"""Bases of values in a model's weights: it computes what it did, and a cache what it would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="5.24")

from transformers import AutoConfig, AutoModelForCausalLM, OlmoConfig, PreTrainedModel, Qwen2Config

from singlepass.kv import MatryoshkaBases, MatryoshkaCache, fit_matryoshka, fold_values, search_ranks

from .models import MODELS, ROUNDINGS, build, error, prompt, run, steps


def fitted(model: PreTrainedModel) -> MatryoshkaBases:
    return fit_matryoshka(model, [prompt(2, 100, seed=7)], progress=False)


@pytest.mark.parametrize("name", ["llama-64", "llama-80-mha", "qwen2", "qwen3", "gemma2", "gpt-oss"])
def test_folded_and_explicit_agree(name: str) -> None:
    """Biases, grouped queries, softcap and sinks included."""
    model = build(**(MODELS[name] | {"head_dim": MODELS[name].get("head_dim", 32)}))
    if name in ("qwen2", "gpt-oss"):
        for module in model.modules():
            if hasattr(module, "v_proj"):
                nn.init.normal_(module.v_proj.bias)
    ids, cuts = prompt(2, 50), steps(30, 50)
    bases = fitted(model)
    model.set_attn_implementation("singlepass")
    plain = run(model, ids, [], None)
    budget = 0.75
    want = run(model, ids, cuts, MatryoshkaCache(model.config, bases, budget))
    folded = fold_values(model, bases)
    assert error(run(model, ids, [], None), plain) < ROUNDINGS
    cache = MatryoshkaCache(model.config, folded, budget)
    assert error(run(model, ids, cuts, cache), want) < ROUNDINGS
    assert error(want, plain) > 10 * ROUNDINGS, "something is lost"


def test_ranks_can_be_searched_and_all_is_saved(tmp_path: Path) -> None:
    model = build(head_dim=32)
    bases = fold_values(model, fitted(model))
    found = search_ranks(model, bases, [prompt(1, 40)], 0.75, progress=False)
    found.save(tmp_path / "bases.safetensors")
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="singlepass").eval()
    cache = MatryoshkaCache(again.config, MatryoshkaBases.load(tmp_path / "bases.safetensors"), 0.75)
    model.set_attn_implementation("singlepass")
    want = run(model, prompt(2, 40), steps(20, 40), MatryoshkaCache(model.config, found, 0.75))
    assert error(run(again, prompt(2, 40), steps(20, 40), cache), want) == 0.0
    assert AutoConfig.from_pretrained(tmp_path / "model").singlepass_folded_values == found.folded


def test_folded_and_unfolded_are_not_mixed() -> None:
    model, other = build(head_dim=32), build(head_dim=32)
    bases = fitted(model)
    with pytest.raises(ValueError, match="bases of this model"):
        fold_values(build(head_dim=32, seed=2), bases)
    folded = fold_values(model, bases)
    with pytest.raises(ValueError, match=r"bases of values in the model's weights; got bases that are not\. Use"):
        MatryoshkaCache(model.config, bases)
    with pytest.raises(ValueError, match="bases that are not; got bases of values in the model's weights"):
        MatryoshkaCache(other.config, folded)
    with pytest.raises(ValueError, match="a model whose values are not folded yet; got a folded one"):
        fold_values(model, folded)
    third = build(head_dim=32)
    later = fold_values(third, fit_matryoshka(third, [prompt(2, 90, seed=8)], progress=False))
    with pytest.raises(ValueError, match=r"the bases in the model's weights \([0-9a-f]{16}\); got"):
        MatryoshkaCache(model.config, later)


def wrapped(model: PreTrainedModel) -> None:
    attention = model.model.layers[1].self_attn
    attention.v_proj = nn.Sequential(attention.v_proj)


def tied(model: PreTrainedModel) -> None:
    model.model.layers[2].self_attn.v_proj.weight = model.model.layers[0].self_attn.v_proj.weight


def gated(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda module, args: (torch.tanh(args[0]),))


def normed(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda module, args, out: out * torch.arange(64))


@pytest.mark.parametrize(
    ("change", "contract"),
    [
        (wrapped, "v_proj of layer 1 as a plain nn.Linear; got Sequential"),
        (tied, "weights of its own in v_proj of layer 0; got shared ones"),
        (gated, "nothing between v_proj and o_proj of layer 1 but attention; got results that change by"),
        (normed, "nothing between v_proj and o_proj of layer 0 but attention"),
    ],
)
def test_models_that_cannot_be_folded_are_unchanged(change: Any, contract: str) -> None:
    model = build(head_dim=32)
    change(model)
    bases = fitted(model)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=contract):
        fold_values(model, bases)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert not hasattr(model.config, "singlepass_folded_values")


def gated_a_little(model: PreTrainedModel) -> None:
    """By numbers close to each other, as gates are at first."""
    gate = 0.5 + 0.2 * torch.rand(128, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: (args[0] * gate,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gates_are_noticed_in_narrow_dtypes(dtype: torch.dtype) -> None:
    model = build(head_dim=32).to(dtype)
    gated_a_little(model)
    bases = fitted(model)
    with pytest.raises(ValueError, match="nothing between v_proj and o_proj of layer 0 but attention"):
        fold_values(model, bases)


def test_errors_and_interrupts_leave_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(head_dim=32)
    bases = fitted(model)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    calls = []

    def interrupted(*args: Any) -> float:
        calls.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr("singlepass.kv._matryoshka._fold._difference", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fold_values(model, bases)
    assert calls
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    monkeypatch.undo()
    clipped = build(OlmoConfig, head_dim=32, clip_qkv=8.0)
    its = fitted(clipped)
    with pytest.raises(ValueError, match="values that are not clipped; got clip_qkv"):
        fold_values(clipped, its)
    fold_values(model, bases)
    with pytest.raises(ValueError, match="a model whose values are not folded; got a folded one"):
        fitted(model)


def test_a_projection_of_two_layers_is_refused() -> None:
    model = build(head_dim=32)
    model.model.layers[2].self_attn.v_proj = model.model.layers[0].self_attn.v_proj
    with pytest.raises(ValueError, match="weights of its own in v_proj of layer 0; got shared ones"):
        fold_values(model, fitted(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights(dtype: torch.dtype) -> None:
    model = build(Qwen2Config, head_dim=32)
    bases = fitted(model)
    narrow = model.to(dtype)
    narrow.set_attn_implementation("singlepass")
    want = run(narrow, prompt(2, 40), [], None)
    folded = fold_values(narrow, bases)
    got = run(narrow, prompt(2, 40), steps(20, 40), MatryoshkaCache(narrow.config, folded, 1.0))
    assert error(got, want) < 3 * 6 * torch.finfo(dtype).eps  # three layers, whose weights were rounded once more
