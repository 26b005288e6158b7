# SPDX-License-Identifier: Apache-2.0
"""Bases: what is fitted, saved and loaded, and for which model they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from singlepass.kv import MatryoshkaBases, MatryoshkaCache, fit_matryoshka
from singlepass.kv._matryoshka._bases import Ranks

from .models import build, prompt, run


def keys_and_values(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Of the first layer, (tokens, heads, channels), without padding, float64."""
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        layer = model(ids, attention_mask=mask, use_cache=True).past_key_values.layers[0]
    shown = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return [x.transpose(1, 2)[shown].double() for x in (layer.keys, layer.values)]


def test_they_are_principal_components() -> None:
    """No orthonormal directions keep more, in float64; padding does not count; the model is what it was."""
    model = build(head_dim=32)
    model.set_attn_implementation("sdpa")
    ids, mask = prompt(3, 80), torch.ones(3, 80, dtype=torch.long)
    mask[0, :30] = 0
    batches = [ids[1:], {"input_ids": ids[:1], "attention_mask": mask[:1]}]
    before = {name: p.clone() for name, p in model.state_dict().items()}
    bases = fit_matryoshka(model, batches, progress=False)
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    found = [
        torch.cat(parts)
        for parts in zip(*(keys_and_values(model, *its) for its in ((ids[1:], None), (ids[:1], mask[:1]))), strict=True)
    ]
    for x, matrices in zip(found, (bases.keys[0], bases.values[0]), strict=True):
        for head in range(2):
            its, u = x[:, head], matrices[head].double()
            assert float((u.mT @ u - torch.eye(32)).abs().max()) < 1e-6
            for rank in (1, 16, 31):
                kept = float((its @ u[:, :rank]).square().sum())
                best = float(torch.linalg.svdvals(its)[:rank].square().sum())
                assert kept == pytest.approx(best, rel=1e-6)
    assert sorted(bases.keys) == sorted(bases.values) == [0, 1, 2]
    assert bases.nbytes == 2 * 3 * 2 * 32 * 32 * 4
    assert repr(bases) == "MatryoshkaBases(llama of 3 layers with 2 KV heads of 32, searched=[])"


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = build(head_dim=32)
    bases = fit_matryoshka(model, [prompt(2, 60)], progress=False)
    ranks = {i: Ranks(torch.tensor([16, 32]), torch.tensor([32, 16])) for i in range(3)}
    bases = MatryoshkaBases(bases.keys, bases.values, bases.model, bases.sample, {0.75: ranks})
    path = tmp_path / "bases.safetensors"
    bases.save(path)
    again = MatryoshkaBases.load(path)
    for name in ("keys", "values"):
        for layer, matrices in getattr(bases, name).items():
            assert torch.equal(getattr(again, name)[layer], matrices)
    assert (again.model, repr(again)) == (bases.model, repr(bases))
    assert [its.tolist() for its in again.ranks_of(0.75)[2]] == [[16, 32], [32, 16]]
    assert "key_ranks=[16, 32]" in repr(MatryoshkaCache(model.config, again, 0.75).layers[0].inner)
    again.check_model("test", model)
    whole = path.read_bytes()
    for size in (0, 5, 200, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"MatryoshkaBases\.load: expected a whole file"):
            MatryoshkaBases.load(path)
    torch.save({}, path)
    with pytest.raises(ValueError, match="Pass a file that save"):
        MatryoshkaBases.load(path)
    with pytest.raises(FileNotFoundError):
        MatryoshkaBases.load(tmp_path / "nothing")


def test_foreign_safetensors_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"a file of singlepass\.matryoshka\.1"):
        MatryoshkaBases.load(path)


def changed(tensors: dict[str, torch.Tensor], **new: Any) -> dict[str, torch.Tensor]:
    out = tensors | {name.replace("_", "."): x for name, x in new.items()}
    return {name: x for name, x in out.items() if x is not None}


@pytest.mark.parametrize(
    "new",
    [
        {"sample": None},
        {"values_1": None},
        {"keys_7": torch.eye(32).expand(2, 32, 32).contiguous()},
        {"keys": torch.zeros(1)},
        {"keys_x": torch.zeros(1)},
        {"keys_0": torch.full((2, 32, 32), torch.nan)},
        {"keys_0": torch.zeros(2, 32, 16)},
        {"ranks_0.5_keys_0": torch.tensor([16, 16])},
        {"ranks_half_keys_0": torch.tensor([16, 16])},
    ],
    ids=str,
)
def test_broken_files_are_refused(new: dict[str, Any], tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = tmp_path / "bases.safetensors"
    fit_matryoshka(build(head_dim=32), [prompt(2, 60)], progress=False).save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file({name: x.clone() for name, x in changed(tensors, **new).items()}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"MatryoshkaBases.*: expected"):
        MatryoshkaBases.load(path)
    save_file(tensors, path, metadata={"format": metadata["format"]})
    with pytest.raises(ValueError, match="a whole file; got KeyError"):
        MatryoshkaBases.load(path)


def test_models_are_told_apart() -> None:
    model = build(head_dim=32)
    bases = fit_matryoshka(model, [prompt(2, 60)], progress=False)
    bases.check_model("test", model.bfloat16())
    with pytest.raises(ValueError, match="a model with other weights"):
        bases.check_model("test", build(head_dim=32, seed=1))
    for other in (build(head_dim=64), build(head_dim=32, num_hidden_layers=2), build(head_dim=32, rope_theta=5000.0)):
        with pytest.raises(ValueError, match="bases of this model"):
            bases.check_config("test", other.config)


@pytest.mark.parametrize(
    ("budget", "head_dim", "want"),
    [(1.0, 32, (32, 32)), (0.5, 32, (16, 16)), (0.75, 32, (16, 32)), (0.9, 64, (48, 64)), (0.6, 64, (32, 32)),
     (0.65, 64, (32, 48)), (0.25, 64, (16, 16)), (1, 80, (80, 80)), (0.9, 80, (64, 80))],
)  # fmt: skip
def test_uniform_ranks_fit_the_budget(budget: float, head_dim: int, want: tuple[int, int]) -> None:
    bases = fit_matryoshka(build(head_dim=head_dim), [prompt(2, 60)], progress=False)
    for ranks in bases.ranks_of(budget).values():
        assert [its.tolist() for its in ranks] == [[rank] * 2 for rank in want]
    assert sum(want) <= budget * 2 * head_dim


def test_budgets_are_numbers_of_any_kind() -> None:
    import numpy as np

    bases = fit_matryoshka(build(head_dim=48), [prompt(2, 60)], progress=False)
    assert bases.ranks_of(np.float32(0.5))[0].keys.tolist() == [16, 16]
    with pytest.raises(ValueError, match=r"a budget of 0.3333333333333333 or more for heads of 48; got 0.333\."):
        bases.ranks_of(0.333)
    ranks = {i: Ranks(torch.tensor([48, 32]), torch.tensor([16, 48])) for i in range(3)}
    found = MatryoshkaBases(bases.keys, bases.values, bases.model, bases.sample, {0.7: ranks})
    assert found.ranks_of(0.1 * 7)[0].keys.tolist() == [48, 32]


def test_wrong_calibration_is_refused() -> None:
    model = build(head_dim=32)
    ids = prompt(2, 60)
    cases: list[tuple[Any, str]] = [
        ([], "at least one batch; got none"),
        (ids, "a list or another iterable of batches; got Tensor"),
        ("text", "a list or another iterable of batches; got str"),
        ([ids[0]], r"token ids \(batch, tokens\); got \(60,\)"),
        ([ids.float()], r"token ids \(batch, tokens\); got .* torch.float32"),
        ([{"ids": ids}], "token ids, or a dictionary with input_ids"),
        ([ids[:, :0]], "tokens in every batch"),
        ([{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}], "tokens in every batch"),
        ([{"input_ids": ids, "attention_mask": torch.ones(2, 3)}], r"an attention_mask \(2, 60\)"),
        ([ids[:1, :31]], "at least 32 tokens, as channels of a head; got 31"),
    ]
    for batches, contract in cases:
        with pytest.raises(ValueError, match=contract):
            fit_matryoshka(model, batches, progress=False)
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite keys in layer 1"):
        fit_matryoshka(model, [ids], progress=False)
    assert not any(hasattr(m, "singlepass_transform") for m in model.modules())
    assert run(build(head_dim=32), ids, [], None).isfinite().all()
