# SPDX-License-Identifier: Apache-2.0
"""The optimizers by name in timm. ``make test-release`` sets up an environment that has it: timm needs torchvision,
which does not import with the torch of ``make test``.
"""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from singlepass import optim, spectral
from singlepass.nn import kat_from_vit, no_weight_decay

from .test_frameworks import OPTIONS, assert_same

NAMES = (*optim._OPTIMIZERS, "SST")
each_optimizer = pytest.mark.parametrize("name", NAMES)
with_timm = pytest.mark.deep("timm takes seconds to import")


def vit(name: str) -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = timm.models.VisionTransformer(**sizes)
    return spectral.convert(model, 4) if name == "SST" else model


def created(model: nn.Module, name: str, **options: Any) -> torch.optim.Optimizer:
    timm = pytest.importorskip("timm")
    optim.register_with_timm()
    options = OPTIONS.get(name, {}) | {"lr": 1e-3, "weight_decay": 0.1} | options
    return timm.optim.create_optimizer_v2(model, f"singlepass-{name.lower()}", **options)


@with_timm
@each_optimizer
def test_timm_makes_the_optimizer(name: str) -> None:
    """With groups of its own, and with what it passes to those that take it."""
    model = vit(name)
    optimizer = created(model, name, eps=1e-5, momentum=0.7)
    assert type(optimizer) is getattr(optim, name)
    without, with_decay = optimizer.param_groups
    assert (without["weight_decay"], with_decay["weight_decay"]) == (0.0, 0.1)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(without["params"]) + len(with_decay["params"]) == len(trained)
    for group in optimizer.param_groups:
        assert group["lr"] == 1e-3
        assert group.get("eps", 1e-5) == 1e-5
        assert group.get("momentum", 0.7) == 0.7
    if "betas" in optimizer.defaults:
        betas = tuple(beta / 2 for beta in optimizer.defaults["betas"])
        assert created(model, name, betas=betas).defaults["betas"] == betas


@with_timm
def test_coefficients_of_activations_have_no_weight_decay() -> None:
    model = kat_from_vit(vit("Lion"))
    optimizer = created(model, "Lion", param_group_fn=lambda model: optim.param_groups(model, 0.5))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    marked = no_weight_decay(model)
    assert marked
    for name, p in model.named_parameters():
        assert decays[id(p)] == (0.0 if name in marked or p.dim() < 2 or name in model.no_weight_decay() else 0.5)


@with_timm
def test_names(caplog: pytest.LogCaptureFixture) -> None:
    timm = pytest.importorskip("timm")
    with caplog.at_level(logging.WARNING, "timm"):
        names = optim.register_with_timm()
        assert optim.register_with_timm() == names
    assert caplog.records == []  # of names that are taken
    assert names == [f"singlepass-{name.lower()}" for name in NAMES]
    assert timm.optim.list_optimizers("singlepass*") == sorted(names)
    assert all(description for _, description in timm.optim.list_optimizers("singlepass*", with_description=True))
    assert timm.optim.get_optimizer_class("lion") is timm.optim.Lion


@with_timm
@each_optimizer
def test_timm_saves_and_resumes(name: str, tmp_path: Path) -> None:
    """With its layer-wise learning rates, its schedule, its files, and its way of loading them."""
    timm = pytest.importorskip("timm")
    utils, scheduler = (importlib.import_module(f"timm.{name}") for name in ("utils", "scheduler"))

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, epochs: range) -> None:
        schedule, _ = scheduler.create_scheduler_v2(optimizer, num_epochs=8, warmup_epochs=2, warmup_lr=1e-5)
        schedule.step(epochs.start)
        for epoch in epochs:
            for i in range(2):
                images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(10 * epoch + i))
                model(images).square().mean().backward()
                utils.dispatch_clip_grad(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            schedule.step(epoch + 1)

    model = vit(name)
    optimizer = created(model, name, layer_decay=0.75)
    train(model, optimizer, range(3))
    saver = utils.CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(2)
    train(model, optimizer, range(3, 6))
    again = vit(name)
    resumed = created(again, name, layer_decay=0.75)
    timm.models.resume_checkpoint(again, str(tmp_path / "last.pth.tar"), resumed)
    train(again, resumed, range(3, 6))
    assert_same(again, model)


def test_without_timm() -> None:
    with (
        mock.patch.dict(sys.modules, {"timm": None, "timm.optim": None}),
        pytest.raises(ImportError, match=r"register_with_timm: expected timm 1\.0\.12 or newer; got .*\. Run: pip"),
    ):
        optim.register_with_timm()
