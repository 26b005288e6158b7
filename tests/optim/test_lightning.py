# SPDX-License-Identifier: Apache-2.0
"""Training under Lightning, stopped and resumed. ``make test-release`` sets up an environment that has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from singlepass import optim, spectral

from .test_frameworks import OPTIONS, assert_same, each_optimizer

pytestmark = [
    pytest.mark.deep("Lightning takes seconds to import"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of its own: few workers, no validation
]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@each_optimizer
def test_lightning_saves_and_resumes(name: str, precision: str, tmp_path: Path) -> None:
    """It makes the model, then the optimizer, and then loads both."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12), nn.LayerNorm(12))
            if name == "SST":
                spectral.convert(self.model, 3)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            # Lightning clips in mixed precision if the optimizer leaves unscaling to others.
            options = OPTIONS[name] | {"unscale_in_step": precision == "32-true"}
            made = getattr(optim, name)(self.parameters(), **options)
            return [made], [torch.optim.lr_scheduler.CosineAnnealingLR(made, 20)]

    data = DataLoader(TensorDataset(torch.randn(16, 12, generator=torch.Generator().manual_seed(1)) ** 3), batch_size=4)

    def train(epochs: int, resume: Path | None = None) -> tuple[Any, nn.Module]:
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=epochs, precision=precision, gradient_clip_val=1.0, accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=resume)
        return trainer, module.model

    _, whole = train(5)
    stopped, half = train(3)
    stopped.save_checkpoint(tmp_path / "checkpoint.ckpt")
    _, resumed = train(5, tmp_path / "checkpoint.ckpt")
    assert_same(resumed, whole)
    assert not torch.equal(resumed[3].weight, half[3].weight)  # it went on
