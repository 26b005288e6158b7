# SPDX-License-Identifier: Apache-2.0
"""Trained bases, and ranks that are searched for."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5.24")

from transformers import PreTrainedModel, Qwen2Config

from singlepass.kv import MatryoshkaBases, MatryoshkaCache, fit_matryoshka, fold_values, search_ranks
from singlepass.kv._matryoshka._hooks import checked_batches
from singlepass.kv._matryoshka._search import _Search
from singlepass.kv._matryoshka._train import cayley, divergence

from .inputs import generator
from .models import build, prompt, run, steps


def model() -> PreTrainedModel:
    return build(head_dim=32, initializer_range=0.3)


def texts() -> list[Tensor]:
    return [prompt(2, 60, seed=seed) for seed in range(3)]


def lost(its: PreTrainedModel, bases: MatryoshkaBases, budget: float) -> float:
    """Divergence from the uncompressed model, on the very texts."""
    found = []
    for ids in texts():
        with torch.no_grad():
            want = its(ids).logits
        its.set_attn_implementation("singlepass")
        cache = MatryoshkaCache(its.config, bases, budget=budget, prefill="truncated")
        found.append(float(divergence(want.flatten(0, 1), run(its, ids, [], cache).flatten(0, 1))))
    return sum(found) / len(found)


@pytest.mark.parametrize("size", [16, 64, 128])
def test_cayley(size: int) -> None:
    """Orthogonal, nothing at zero, and its inverse gives back what it was made of."""
    x = torch.randn(4, size, size, generator=generator(0))
    u = cayley(x)
    eye = torch.eye(size)
    assert float((u.mT @ u - eye).abs().max()) < 1e-5
    assert torch.equal(cayley(torch.zeros(1, size, size))[0], eye)
    exact = cayley(x.double())
    a = 2 * (exact - eye.double()) @ torch.linalg.inv(exact + eye.double())
    torch.testing.assert_close(a.tril(-1), x.double().tril(-1), rtol=0.0, atol=1e-6)


def test_training_loses_less_than_principal_components() -> None:
    its = model()
    start = fit_matryoshka(its, texts(), progress=False)
    before = {name: p.clone() for name, p in its.state_dict().items()}
    trained = fit_matryoshka(its, texts(), steps=60, lr=2e-2, distill=1.0, progress=False)
    assert lost(its, trained, 0.5) < 0.8 * lost(its, start, 0.5)
    assert lost(its, trained, 1.0) < 1e-6
    assert all(torch.equal(p, before[name]) for name, p in its.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in its.parameters())
    for matrices in (*trained.keys.values(), *trained.values.values()):
        assert float((matrices.mT @ matrices - torch.eye(32)).abs().max()) < 1e-5


def test_recomputed_layers_give_the_same() -> None:
    its = model().train()
    options: dict[str, Any] = {"steps": 5, "progress": False}
    plain = fit_matryoshka(its, texts(), **options)
    again = fit_matryoshka(its, texts(), gradient_checkpointing=True, **options)
    assert its.training
    assert not its.is_activation_checkpointing
    for layer in range(3):
        torch.testing.assert_close(plain.values[layer], again.values[layer], rtol=0.0, atol=1e-6)
        assert not torch.equal(plain.values[layer], fit_matryoshka(its, texts(), progress=False).values[layer])


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    class StoppedError(Exception):
        pass

    class Stops(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            if self.left == 0:
                raise StoppedError
            self.left -= 1
            super().step(closure)

    def stops_after(left: int) -> Any:
        def make(parameters: list[nn.Parameter]) -> Stops:
            optimizer = Stops(parameters, lr=0.1, momentum=0.9)
            optimizer.left = left
            return optimizer

        return make

    its, path = model(), tmp_path / "training.pt"
    options: dict[str, Any] = {"steps": 45, "progress": False}
    want = fit_matryoshka(its, texts(), optimizer=stops_after(100), **options)
    with pytest.raises(StoppedError):
        fit_matryoshka(its, texts(), optimizer=stops_after(30), checkpoint=path, **options)
    assert all(p.requires_grad for p in its.parameters())
    got = fit_matryoshka(its, texts(), optimizer=stops_after(25), checkpoint=path, **options)
    for layer in range(3):
        torch.testing.assert_close(got.keys[layer], want.keys[layer], rtol=0.0, atol=1e-6)
    done = fit_matryoshka(its, texts(), optimizer=stops_after(0), checkpoint=path, **options)
    assert torch.equal(done.keys[0], got.keys[0])
    for changed in ({"steps": 46}, {"seed": 1}, {"lr": 0.5}, {"distill": 1.0}, {"batches": texts()[:2]}):
        good: dict[str, Any] = {"batches": texts(), "optimizer": stops_after(0), "checkpoint": path}
        with pytest.raises(ValueError, match="a checkpoint of this training"):
            fit_matryoshka(its, **(good | options | changed))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="a whole checkpoint"):
        fit_matryoshka(its, texts(), optimizer=stops_after(0), checkpoint=path, **options)


def test_checkpoints_of_other_models_and_broken_ones(tmp_path: Path) -> None:
    path = tmp_path / "training.pt"
    options: dict[str, Any] = {"steps": 1, "checkpoint": path, "progress": False}
    fit_matryoshka(model(), texts(), **options)
    with pytest.raises(ValueError, match="a checkpoint of this training"):
        fit_matryoshka(build(head_dim=32, seed=5), texts(), **options)
    saved = torch.load(path, weights_only=True)
    for wrong in (
        {},
        saved | {"settings": 1},
        saved | {"tensors": saved["tensors"][:1]},
        saved | {"tensors": [x[:1] for x in saved["tensors"]]},
        saved | {"step": 7},
        saved | {"parts": []},
    ):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match="a whole checkpoint"):
            fit_matryoshka(model(), texts(), **options)
    with pytest.raises(ValueError, match="a folder that exists"):
        fit_matryoshka(model(), texts(), steps=1, checkpoint=tmp_path / "no" / "training.pt", progress=False)


def test_the_model_is_what_it_was() -> None:
    its = build(head_dim=32, attention_dropout=0.5).train()
    its.model.layers[1].eval()
    flags = [m.training for m in its.modules()]
    its.activation_checkpointing_enable()
    functions = [vars(m).get("_gradient_checkpointing_func") for m in its.modules()]
    with torch.inference_mode():
        first = fit_matryoshka(its, texts(), progress=False)
        fit_matryoshka(its, texts(), steps=2, gradient_checkpointing=True, progress=False)
        second = fit_matryoshka(its, texts(), progress=False)
    assert torch.equal(first.keys[0], second.keys[0]), "without dropout"
    assert [m.training for m in its.modules()] == flags
    assert [vars(m).get("_gradient_checkpointing_func") for m in its.modules()] == functions
    assert all(p.requires_grad for p in its.parameters())
    frozen = build(head_dim=32).requires_grad_(False)
    fit_matryoshka(frozen, texts(), steps=2, gradient_checkpointing=True, progress=False)
    assert not frozen(prompt(1, 10)).logits.requires_grad


def test_padding_is_not_learnt_from() -> None:
    its, ids = model(), prompt(2, 60)
    mask = torch.ones_like(ids)
    mask[:, :20] = 0
    other = ids.clone()
    other[:, :20] = 5
    bases = [
        fit_matryoshka(its, [{"input_ids": x, "attention_mask": mask}], steps=3, progress=False) for x in (ids, other)
    ]
    torch.testing.assert_close(bases[0].keys[1], bases[1].keys[1], rtol=0.0, atol=1e-5)


def test_wrong_options_of_training() -> None:
    its = model()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"steps": -1}, "steps as a whole number, 0 or more; got -1"),
        ({"steps": 1.5}, "steps as a whole number"),
        ({"lr": 0.0}, "an lr over 0"),
        ({"lr": float("nan")}, "an lr over 0"),
        ({"distill": 1.5}, "distill from 0 to 1"),
        ({"optimizer": lambda parameters: None}, "an optimizer; got NoneType"),
        ({"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=float("inf"))}, "finite bases after step 0"),
    ]
    for options, contract in cases:
        with pytest.raises(ValueError, match=contract):
            fit_matryoshka(its, texts(), **({"steps": 2, "progress": False} | options))
    with pytest.raises(ValueError, match="a model with a head for language modelling; got LlamaModel"):
        fit_matryoshka(its.model, texts(), steps=1, progress=False)
    assert all(p.requires_grad for p in its.parameters())


def brute_force(its: PreTrainedModel, bases: MatryoshkaBases, target: int) -> list[list[list[int]]]:
    """The paper's search, in which everything is measured every time."""
    search = _Search(its, bases, checked_batches("test", texts()[:1]), {"full_attention"})
    entries = list(itertools.product(range(3), range(2), range(2)))
    while search.kept > target:
        costs = []
        for layer, kind, head in entries:
            ranks = search.ranks[layer][kind]
            if ranks[head] > 16:
                ranks[head] -= 16
                costs.append((search.divergence(), layer, kind, head))
                ranks[head] += 16
        _, layer, kind, head = min(costs)
        search.ranks[layer][kind][head] -= 16
    return [[ranks.tolist() for ranks in pair] for pair in search.ranks.values()]


def test_search_finds_what_loses_least() -> None:
    its = model()
    bases = fit_matryoshka(its, texts(), progress=False)
    found = search_ranks(its, bases, texts()[:1], 0.75, progress=False)
    ranks = found.ranks_of(0.75)
    kept = sum(int(its.sum()) for pair in ranks.values() for its in pair)
    assert kept == 0.75 * 3 * 2 * 2 * 32
    assert lost(its, found, 0.75) < lost(its, bases, 0.75)
    assert [[its.tolist() for its in pair] for pair in ranks.values()] == brute_force(its, bases, kept)
    rough = search_ranks(its, found, texts()[:1], 0.75, per_round=12, progress=False)
    assert lost(its, rough, 0.75) < lost(its, bases, 0.75)
    both = search_ranks(its, found, texts()[:1], 0.6, progress=False)
    assert sorted(both.ranks) == [0.6, 0.75]
    cache = MatryoshkaCache(its.config, both, 0.6)
    run(its, prompt(2, 30), steps(20, 30), cache)
    total = sum(layer.inner.kept_channels for layer in cache.layers)
    assert total <= 0.6 * 3 * 2 * 2 * 32 < total + 16
    assert cache.nbytes == total * 2 * 30 * 4 or cache.nbytes > total * 2 * 30 * 4  # with room for more


def test_layers_that_a_cache_leaves_alone_take_no_part() -> None:
    options: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
    its = build(Qwen2Config, head_dim=64, **options)
    bases = fit_matryoshka(its, [prompt(2, 80)], progress=False)
    found = search_ranks(its, bases, [prompt(1, 30)], 0.5, per_round=8, progress=False)
    assert "kept=0.500, bits=None, layers=3, compressed=1" in repr(MatryoshkaCache(its.config, found, 0.5))


def test_wrong_searches() -> None:
    its = model()
    bases = fit_matryoshka(its, texts(), progress=False)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"budget": 0.4}, "a budget of 0.5 or more"),
        ({"budget": 2.0}, "a budget over 0, up to 1"),
        ({"per_round": 0}, "per_round as a whole number"),
        ({"batches": []}, "at least one batch"),
        ({"model": build(head_dim=32, seed=3)}, "a model with other weights"),
    ]
    for options, contract in cases:
        good: dict[str, Any] = {"model": its, "bases": bases, "batches": texts(), "budget": 0.75}
        with pytest.raises(ValueError, match=contract):
            search_ranks(**(good | {"progress": False} | options))


def test_the_default_device_does_not_matter() -> None:
    """What is drawn with a generator of the host stays there, whatever ``torch.set_default_device`` names."""
    model, texts = build(head_dim=32, num_hidden_layers=1), [prompt(2, 20)]
    want = fit_matryoshka(model, texts, 2, progress=False)
    found = search_ranks(model, want, texts, 0.75, progress=False)
    with torch.device("meta"):
        got = fit_matryoshka(model, texts, 2, progress=False)
        again = search_ranks(model, want, texts, 0.75, progress=False)
        fold_values(model, want)
    assert torch.equal(got.keys[0], want.keys[0])
    assert torch.equal(again.ranks_of(0.75)[0].keys, found.ranks_of(0.75)[0].keys)
