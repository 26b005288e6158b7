# SPDX-License-Identifier: Apache-2.0
"""Training a language model from scratch in four ways: full rank, SST, LoRA and ReLoRA, all else being equal."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from _decoder import Decoder
from _lora import lora_parameters, merge_and_restart, with_lora
from _text import read_corpus, windows
from _training import rate
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from singlepass.optim import AdamW
from singlepass.spectral import SST, SSTLinear, convert
from singlepass.spectral._decompose import drift

METHODS = ("full rank", "SST", "LoRA", "ReLoRA")

PIECE, VALIDATED = 8192, 10  # of the text to train on, one piece of so many is for choosing learning rates
CURVE = 20  # points of a curve
CURVE_WINDOWS = 32  # of held-out text behind each of them; the final loss is over all of it


@dataclass(frozen=True)
class Settings:
    """What is trained, how long, and how each method goes about it."""

    steps: int = 800
    sequences: int = 4  # of a step
    length: int = 128
    dim: int = 64
    depth: int = 2
    heads: int = 4
    betas: tuple[float, float] = (0.9, 0.98)
    rank: int = 4
    steps_per_iteration: int = 40  # chosen among 5 to 80 on the text that also chooses learning rates
    warmup_steps: int = 4
    lora_rank: int = 5  # the lowest that trains no fewer numbers than SST, which trains all singular values
    lora_scale: float = 2.0  # alpha / rank
    restart: int = 100  # steps between restarts of ReLoRA
    rewarm: int = 10  # steps after a restart in which the learning rate rises


@dataclass
class Data:
    """Bytes, uint8: to train on, to choose learning rates by, and held out."""

    train: Tensor
    validation: Tensor
    held_out: Tensor
    files: int
    digest: str


@dataclass
class Run:
    """One training."""

    method: str
    seed: int
    lr: float
    loss: float = math.nan  # at the end, nats per byte
    trained: int = 0  # numbers with a gradient
    step_ms: float = math.nan  # median
    curve: list[tuple[int, float]] = field(default_factory=list)  # steps done, loss
    # Steps done, and the least, median and greatest drift of all layers one step before a round of SST ends.
    drifts: list[tuple[int, float, float, float]] = field(default_factory=list)


def read_data() -> Data:
    corpus = read_corpus()
    pieces = corpus.train.split(PIECE)
    parts = [[p for i, p in enumerate(pieces) if (i % VALIDATED == 0) == kept] for kept in (False, True)]
    return Data(*map(torch.cat, parts), corpus.held_out, corpus.files, corpus.digest)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def loss_on(model: nn.Module, text: Tensor, length: int, count: int | None = None) -> float:
    """Over pieces of a text side by side, all of them or ``count`` evenly spread ones."""
    pieces = text.unfold(0, length + 1, length)
    if count is not None and count < len(pieces):
        pieces = pieces[torch.linspace(0, len(pieces) - 1, count).long()]
    total = sum(loss_of(model, some.long()).item() * len(some) for some in pieces.split(64))
    return total / len(pieces)


class Trainer:
    """A model, its optimizer, and what a method does between steps."""

    def __init__(self, method: str, settings: Settings, lr: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.method, self.settings = method, settings
        model = self.model = Decoder(settings.dim, settings.depth, settings.heads, settings.length)
        self.optimizer: Optimizer
        if method == "full rank":
            self.optimizer = AdamW(model.parameters(), lr=lr, betas=settings.betas)
        elif method == "SST":
            convert(model, settings.rank)
            self.optimizer = SST(
                model,
                lr=lr,
                betas=settings.betas,
                steps_per_iteration=settings.steps_per_iteration,
                warmup_steps=settings.warmup_steps,
                seed=seed,
            )
        else:
            with_lora(model, settings.lora_rank, settings.lora_scale, skip="head")
            products = {id(p) for p in lora_parameters(model)}
            trained = [p for p in model.parameters() if p.requires_grad]
            groups = [{"params": [p for p in trained if (id(p) in products) == chosen]} for chosen in (False, True)]
            self.optimizer = AdamW(groups, lr=lr, betas=settings.betas)
        shapes = [self.rate, self.rate_after_restarts] if method == "ReLoRA" else self.rate
        self.schedule = LambdaLR(self.optimizer, shapes)

    def rate(self, step: int) -> float:
        return rate(step, self.settings.steps)

    def rate_after_restarts(self, step: int) -> float:
        """Of ReLoRA's products, which also rises from each restart on."""
        since = step % self.settings.restart + 1
        rising = min(since / self.settings.rewarm, 1.0) if step >= self.settings.restart else 1.0
        return self.rate(step) * rising

    def step(self, batch: Tensor) -> float:
        loss = loss_of(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        done = self.schedule.last_epoch
        if self.method == "ReLoRA" and done % self.settings.restart == 0 and done < self.settings.steps:
            merge_and_restart(self.model, self.optimizer)
        return loss.item()

    def drifts(self) -> tuple[float, float, float] | None:
        """The least, median and greatest of all layers, if the next step ends a round of SST."""
        optimizer = self.optimizer
        if not isinstance(optimizer, SST):
            return None
        progress = optimizer.progress
        last = optimizer.steps_per_iteration - 1, optimizer.iterations_per_round - 1
        if (progress.step, progress.iteration) != last:
            return None
        factors = [layer.factors() for layer in self.model.modules() if isinstance(layer, SSTLinear)]
        values = [drift(u, v) for u, _, v in factors]
        return min(values), statistics.median(values), max(values)


def batches(text: Tensor, settings: Settings, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.steps):
        yield windows(text, settings.length + 1, settings.sequences, generator)


def train(
    run: Run, settings: Settings, text: Tensor, exam: Tensor, report: Callable[[Run, float], None], curve: int = CURVE
) -> Run:
    """Fills a run in: trained on ``text``, examined on ``exam`` at the end and ``curve`` times on the way."""
    trainer = Trainer(run.method, settings, run.lr, run.seed)
    run.trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    every = max(settings.steps // curve, 1) if curve else settings.steps + 1
    times: list[float] = []
    for done, batch in enumerate(batches(text, settings, run.seed)):
        if found := trainer.drifts():
            run.drifts.append((done, *found))
        start = time.perf_counter()
        loss = trainer.step(batch)
        times.append(time.perf_counter() - start)
        if not math.isfinite(loss):
            run.loss = math.inf
            return run
        if (done + 1) % every == 0:
            run.curve.append((done + 1, round(loss_on(trainer.model, exam, settings.length, CURVE_WINDOWS), 5)))
        report(run, loss)
    run.step_ms = round(1e3 * statistics.median(times), 1)
    run.loss = round(loss_on(trainer.model, exam, settings.length), 5)
    return run
