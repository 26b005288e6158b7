# SPDX-License-Identifier: Apache-2.0
"""Frameworks, really run: training that is stopped and resumed ends with the bits of training that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singlepass import optim, spectral

from ..tolerances import assert_same_bits

pytestmark = pytest.mark.deep("frameworks that take seconds to import and to start")

OPTIONS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 1e-2},
    "Lion": {"lr": 1e-3},
    "LAMB": {"lr": 1e-2},
    "SST": {"lr": 1e-2, "steps_per_iteration": 4, "iterations_per_round": 3, "warmup_steps": 2},
}
each_optimizer = pytest.mark.parametrize("name", OPTIONS)


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert_same_bits(a, b)


@each_optimizer
def test_trainer_makes_the_optimizer(name: str, tmp_path: Path) -> None:
    """With ``optimizer_cls_and_kwargs`` it loads the model, makes the optimizer, and loads that."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, **sizes)
    tokens = torch.randint(64, (32, 16), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in tokens]

    def train(folder: Path, resume: str | None = None) -> nn.Module:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        if name == "SST":
            spectral.convert(model, 4)
        arguments = transformers.TrainingArguments(
            str(folder), max_steps=10, per_device_train_batch_size=4, save_steps=6, report_to=[], use_cpu=True,
            disable_tqdm=True, logging_strategy="no", weight_decay=0.1,
        )  # fmt: skip
        made = getattr(optim, name), OPTIONS[name]
        trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=made)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = train(tmp_path / "whole")
    assert_same(train(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-6")), whole)


class Training:
    """A small model under accelerate."""

    def __init__(self, name: str) -> None:
        accelerate = pytest.importorskip("accelerate")
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12), nn.LayerNorm(12))
        if name == "SST":
            spectral.convert(self.model, 3)
        optimizer = getattr(optim, name)(self.model.parameters(), **OPTIONS[name])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        self.accelerator = accelerate.Accelerator(cpu=True)
        self.prepared, self.optimizer, self.schedule = self.accelerator.prepare(self.model, optimizer, schedule)

    def run(self, steps: range) -> None:
        for step in steps:
            x: Tensor = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
            self.accelerator.backward(self.prepared(x).square().mean())
            self.accelerator.clip_grad_norm_(self.prepared.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()


@each_optimizer
def test_accelerate_saves_and_loads(name: str, tmp_path: Path) -> None:
    training = Training(name)
    training.run(range(6))
    training.accelerator.save_state(str(tmp_path))
    training.run(range(6, 14))
    again = Training(name)
    again.accelerator.load_state(str(tmp_path))
    again.run(range(6, 14))
    assert_same(again.model, training.model)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "SST"])  # an average of vectors is no weight's
def test_averaged_weights(name: str) -> None:
    """torch.optim.swa_utils: the average of what the optimizer left, and its scheduler."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
    optimizer = getattr(optim, name)(model.parameters(), **OPTIONS[name])
    averaged = torch.optim.swa_utils.AveragedModel(model)
    schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=1e-3, anneal_epochs=2)
    seen = []
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 12)).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
        schedule.step()
        seen.append(model[0].weight.detach().double().clone())
    torch.testing.assert_close(averaged.module[0].weight.double(), torch.stack(seen).mean(0), rtol=1e-5, atol=1e-6)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
