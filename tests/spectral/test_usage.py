# SPDX-License-Identifier: Apache-2.0
"""In training loops as they are: accumulation, autocast, loss scaling, schedulers, Trainer, data parallelism."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from singlepass import spectral
from singlepass.spectral import SST

from ..tolerances import assert_same_bits
from .training import SCHEDULE, give_gradients, layers_of, model_of, run, snapshot


def loss_of(model: nn.Module, step: int, tokens: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(tokens, n, generator=generator) for n in (12, 5))
    return (model(x.to(next(model.parameters()).dtype)) - y).square().mean()


def test_trains() -> None:
    model = model_of()
    optimizer = SST(model, lr=1e-2, **SCHEDULE)
    losses = []
    for _ in range(60):
        losses.append(loss_of(model, 0))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    model, other = model_of(), model_of()
    optimizers = [SST(m, lr=1e-2, **SCHEDULE) for m in (model, other)]
    x, y = torch.randn(8, 12), torch.randn(8, 5)
    (model(x) - y).square().mean().backward()
    for part in (slice(0, 4), slice(4, 8)):
        ((other(x[part]) - y[part]).square().mean() / 2).backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    for optimizer in optimizers:
        optimizer.step()


def test_loss_scaling_skips_what_overflowed() -> None:
    model, plain = model_of(), model_of()
    optimizer, reference = (SST(m, lr=1e-2, eps=1e-6, **SCHEDULE) for m in (model, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(7):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == 2:
            layers_of(model)[0].active_u.grad[0, 0] = float("inf")
            before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            for p, was in zip(model.parameters(), before, strict=True):
                assert_same_bits(p.detach(), was)
            reference.step()  # without gradients: it counts, as a skipped step does
            continue
        reference.zero_grad()
        loss_of(plain, step).backward()
        reference.step()
        reference.zero_grad()
    assert scaler.get_scale() == 512.0
    assert optimizer.progress == reference.progress
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_autocast_and_a_scheduler() -> None:
    model = model_of()
    optimizer = SST(model, lr=1e-2, **SCHEDULE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=1e-4)
    losses = []
    for _ in range(40):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(loss_of(model, 0))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
        scheduler.step()
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


@pytest.mark.parametrize("frozen_dtype", [None, torch.int8], ids=str)
def test_a_frozen_layer_stays_as_it_is(frozen_dtype: torch.dtype | None) -> None:
    """Through swaps and rounds, and other layers are trained as if it were not frozen. Thawed, it goes on."""
    models = [model_of(frozen_dtype=frozen_dtype) for _ in range(2)]
    optimizers = [SST(model, lr=1e-2, **SCHEDULE) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        run(model, optimizer, 6)
    layer, other = layers_of(models[0])
    layer.requires_grad_(False)
    layer.zero_grad()
    before = {name: t.clone() for name, t in layer.state_dict().items() if name != "draws"}
    for i in range(6, 20):
        give_gradients(models[1], i)
        for p, twin in zip(models[0].parameters(), models[1].parameters(), strict=True):
            p.grad = twin.grad if p.requires_grad else None
        for optimizer in optimizers:
            optimizer.step()
    for name, t in before.items():
        assert_same_bits(layer.state_dict()[name], t, name)
    for name, t in layers_of(models[1])[1].state_dict().items():
        assert_same_bits(other.state_dict()[name], t, name)
    layer.requires_grad_(True)
    run(models[0], optimizers[0], 8, 20)
    assert not torch.equal(layer.singular_values, before["singular_values"])
    again = model_of(frozen_dtype=frozen_dtype)
    again.load_state_dict(models[0].state_dict())
    resumed = SST(again, lr=1e-2, **SCHEDULE)
    resumed.load_state_dict(optimizers[0].state_dict())
    run(again, resumed, 1)


def test_a_closure() -> None:
    model = model_of()
    optimizer = SST(model, lr=1e-2, **SCHEDULE)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def _parallel(rank: int, folder: str) -> None:
    """One process of two: other data, another generator; the draws and the weights must be the same."""
    os.environ |= {"MASTER_ADDR": "localhost", "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = []
    for dtype, stochastic in ((torch.float32, False), (torch.bfloat16, True)):
        model = model_of(dtype)
        parallel = DistributedDataParallel(model)
        torch.manual_seed(rank)
        optimizer = SST(model, lr=1e-2, stochastic_rounding=stochastic, **SCHEDULE)
        for step in range(14):
            optimizer.zero_grad()
            loss_of(parallel, 2 * step + rank).backward()
            optimizer.step()
        results += [torch.tensor(optimizer.progress.as_tuple()), *snapshot(model)]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.serial
@pytest.mark.slow("two processes import torch")
def test_ranks_of_a_data_parallel_job_stay_together(tmp_path: Path) -> None:
    mp.spawn(_parallel, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first[0].tolist() == [1, 0, 2, 4]
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)


@pytest.mark.slow("two trainings by transformers")
def test_transformers_trainer(tmp_path: Path) -> None:
    """A Llama from a config, trained, saved in the middle of an iteration, and resumed bit for bit."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    tokens = torch.randint(64, (32, 16), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in tokens]

    def train(folder: Path, steps: int, resume: str | None = None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = spectral.convert(transformers.LlamaForCausalLM(config), 4)
        assert type(model.lm_head) is nn.Linear
        optimizer = SST(model, lr=1e-2, **SCHEDULE)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        arguments = transformers.TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=6, report_to=[], use_cpu=True,
            disable_tqdm=True, gradient_accumulation_steps=2, logging_strategy="no",
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, scheduler))
        trainer.train(resume_from_checkpoint=resume)
        return snapshot(model)

    whole = train(tmp_path / "whole", 10)
    resumed = train(tmp_path / "again", 10, str(tmp_path / "whole" / "checkpoint-6"))
    for a, b in zip(resumed, whole, strict=True):
        assert_same_bits(a, b)


def test_gpt2() -> None:
    """Its Conv1D layers, whose weights are transposed; ``merge`` makes them torch.nn.Linear."""
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    tokens = torch.arange(24).view(2, 12)
    expected = model(tokens).logits
    spectral.convert(model, 4)
    assert len(layers_of(model)) == 8
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    optimizer = SST(model, lr=1e-2, **SCHEDULE)
    for _ in range(5):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model(tokens).logits
    spectral.merge(model)
    assert type(model.transformer.h[0].attn.c_attn) is nn.Linear
    torch.testing.assert_close(model(tokens).logits, trained, rtol=1e-4, atol=1e-5)


def test_layers_with_hooks_are_not_converted() -> None:
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 12))
    handle = model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"convert: expected layers without hooks to replace.*; got hooks at 1"):
        spectral.convert(model, 3)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]
    handle.remove()
    spectral.convert(model, 3)
    with pytest.raises(ValueError, match=r"expected torch\.nn\.Linear or Conv1D layers .*; got none in Sequential"):
        spectral.convert(model, 3)
