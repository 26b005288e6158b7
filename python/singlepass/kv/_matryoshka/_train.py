# SPDX-License-Identifier: Apache-2.0
"""Training of bases, so that as little as possible is lost at any rank."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm  # comes with transformers
from transformers.modeling_utils import PreTrainedModel

from ..._errors import message, require
from ...optim import AdamW
from ._bases import STEP, describe, sample_of
from ._hooks import Batch, evaluating, transformed

_OP = "fit_matryoshka"
_SAVE_EVERY = 20  # steps
Bases = dict[int, list[Tensor]]  # by number of the layer, of keys and of values


def cayley(x: Tensor) -> Tensor:
    """Orthogonal (I - A/2)^-1 (I + A/2) of A = L - L^T, where L is what x (..., n, n) has below its diagonal."""
    lower = x.tril(-1)
    half = (lower - lower.mT) / 2
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(eye - half, eye + half)


@torch.inference_mode(False)
@torch.enable_grad()
def train(
    model: PreTrainedModel,
    start: Bases,
    batches: list[Batch],
    steps: int,
    *,
    lr: float,
    distill: float,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None,
    seed: int,
    path: str | os.PathLike[str] | None,
    gradient_checkpointing: bool,
    progress: bool,
) -> Bases:
    """Bases U C(X) for those that it starts from, U, with X trained."""
    device = next(model.parameters()).device
    start = {layer: [u.to(device) for u in pair] for layer, pair in start.items()}
    turns = {layer: [nn.Parameter(torch.zeros_like(u)) for u in pair] for layer, pair in start.items()}
    parameters = [x for pair in turns.values() for x in pair]
    chosen = AdamW(parameters, lr=lr, weight_decay=0.0) if optimizer is None else optimizer(parameters)
    require(
        isinstance(chosen, Optimizer), _OP, "an optimizer", type(chosen).__name__, "Pass a function that makes one."
    )
    warmup = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: _share_of_lr(step, steps, warmup))
    settings = {"steps": steps, "lr": lr, "distill": distill, "seed": seed, "optimizer": type(chosen).__name__}
    saved = _Checkpoint(path, settings | {"data": _digest(model, batches)})
    tensors = [*parameters, *(u for pair in start.values() for u in pair)]  # principal components have any sign
    done = saved.load(tensors, chosen, schedule)
    with _only_bases_train(model, gradient_checkpointing):
        for step in tqdm(range(done, steps), "training bases", steps, initial=done, disable=not progress, unit="step"):
            batch = batches[step % len(batches)]
            chosen.zero_grad()
            loss = _learn(model, batch, _bases(start, turns), _masks(start, seed, step), distill)
            contract, remedy = f"a finite loss in step {step}", "Lower lr, or check the model's dtype."
            require(math.isfinite(loss), _OP, contract, loss, remedy)
            chosen.step()
            schedule.step()
            finite = all(bool(x.isfinite().all()) for x in parameters)
            require(finite, _OP, f"finite bases after step {step}", "others", remedy)
            if (step + 1) % _SAVE_EVERY == 0 or step + 1 == steps:
                saved.save(step + 1, tensors, chosen, schedule)
    with torch.no_grad():
        whole = {layer: [x.double() for x in pair] for layer, pair in turns.items()}
        first = {layer: [u.double() for u in pair] for layer, pair in start.items()}
        return {layer: [u.float().cpu() for u in pair] for layer, pair in _bases(first, whole).items()}


def _share_of_lr(step: int, steps: int, warmup: int) -> float:
    """Rises linearly, then falls as a cosine to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))


def _bases(start: Bases, turns: dict[int, list[Any]]) -> Bases:
    return {layer: [u @ cayley(x) for u, x in zip(start[layer], turns[layer], strict=True)] for layer in start}


def _masks(like: Bases, seed: int, step: int) -> Bases:
    """Which directions are kept in one step, 0 or 1 (heads, channels): for each head any number, in steps of 16."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)

    def drawn(u: Tensor) -> Tensor:
        heads, most = u.shape[:2]
        ranks = STEP * torch.randint(1, most // STEP + 1, (heads, 1), generator=generator, device="cpu")
        return (torch.arange(most, device="cpu") < ranks).to(u)

    return {layer: [drawn(u) for u in pair] for layer, pair in like.items()}


def truncate(x: Tensor, basis: Tensor, mask: Tensor) -> Tensor:
    """x (batch, heads, tokens, channels) as far as the kept directions of its basis have it."""
    u = basis.to(x)
    return ((x @ u) * mask.to(x)[:, None]) @ u.mT


def _learn(model: PreTrainedModel, batch: Batch, bases: Bases, masks: Bases, distill: float) -> float:
    """Gradients of distill * KL(uncompressed || truncated) + (1 - distill) * the loss of language modelling."""

    def transform(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        (of_keys, of_values), (kept_keys, kept_values) = bases[layer], masks[layer]
        return truncate(k, of_keys, kept_keys), truncate(v, of_values, kept_values)

    inputs = batch.inputs(model)
    with torch.no_grad():
        want = model(**inputs, use_cache=False).logits
    with transformed(model, transform):
        got = model(**inputs, use_cache=False).logits
        shown = batch.shown.to(got.device)
        loss = distill * divergence(want[shown], got[shown])
        next_to = shown[:, :-1] & shown[:, 1:]
        if distill < 1.0 and bool(next_to.any()):
            targets = inputs["input_ids"][:, 1:][next_to]
            loss = loss + (1.0 - distill) * F.cross_entropy(got[:, :-1][next_to].float(), targets)
        loss.backward()  # in here, for it may compute layers again
    return loss.item()


def divergence(want: Tensor, got: Tensor) -> Tensor:
    """The mean of KL(want || got) over rows of logits."""
    log_want, log_got = want.float().log_softmax(-1), got.float().log_softmax(-1)
    return F.kl_div(log_got, log_want, log_target=True, reduction="batchmean")


@contextmanager
def _only_bases_train(model: PreTrainedModel, gradient_checkpointing: bool) -> Iterator[None]:
    """Weights need no gradient, layers are recomputed if asked for; afterwards the model is what it was."""
    needed = [p for p in model.parameters() if p.requires_grad]
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    layers = [m for m in model.modules() if hasattr(m, names[0])]
    before = [{name: vars(m)[name] for name in names if name in vars(m)} for m in layers]
    model.requires_grad_(False)
    try:
        with evaluating(model):
            for module in layers if gradient_checkpointing else ():
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
                module.training = True  # itself alone, without dropout within
            yield
    finally:
        for module, its in zip(layers, before, strict=True):
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(its)
        for parameter in needed:
            parameter.requires_grad_(True)


def _digest(model: PreTrainedModel, batches: list[Batch]) -> str:
    """Of what is trained on."""
    digest = hashlib.sha256(describe(model.config).encode())
    digest.update(sample_of(model).numpy().tobytes())
    for batch in batches:
        digest.update(batch.ids.numpy().tobytes())
        digest.update(batch.shown.numpy().tobytes())
    return digest.hexdigest()


def check_checkpoint(path: str | os.PathLike[str] | None) -> None:
    """Raises unless a checkpoint can be written there."""
    if path is not None:
        folder = Path(path).parent
        require(folder.is_dir(), f"{_OP}(checkpoint=...)", "a folder that exists", folder, "Create it first.")


class _Checkpoint:
    """A file to go on from, or none."""

    def __init__(self, path: str | os.PathLike[str] | None, settings: dict[str, Any]):
        self._path = None if path is None else Path(path)
        self._settings = settings

    def save(self, step: int, tensors: list[Tensor], *parts: Any) -> None:
        if self._path is None:
            return
        state = {"settings": self._settings, "step": step, "parts": [part.state_dict() for part in parts]}
        state["tensors"] = [x.detach() for x in tensors]
        aside = self._path.with_name(self._path.name + ".part")
        torch.save(state, aside)
        os.replace(aside, self._path)

    def load(self, tensors: list[Tensor], *parts: Any) -> int:
        """Fills in what was saved. Returns the number of steps done."""
        if self._path is None or not self._path.exists():
            return 0
        where, remedy = f"{_OP}(checkpoint=...)", "Pass another path, or delete the file."
        try:
            state = torch.load(self._path, map_location=tensors[0].device, weights_only=True)
            settings, step, saved, states = (state[name] for name in ("settings", "step", "tensors", "parts"))
            differing = {name: settings.get(name) for name, its in self._settings.items() if settings.get(name) != its}
        except Exception as error:  # torch.load raises what its reader happens to meet
            raise ValueError(message(where, "a whole checkpoint", _first_line(error), remedy)) from error
        require(not differing, where, f"a checkpoint of this training, {self._settings}", differing, remedy)
        try:
            same = [x.shape for x in tensors] == [x.shape for x in saved] and 0 <= step <= self._settings["steps"]
            for part, its in zip(parts, states, strict=True):
                part.load_state_dict(its)
        except Exception as error:  # so do optimizers
            raise ValueError(message(where, "a whole checkpoint", _first_line(error), remedy)) from error
        require(same, where, "a whole checkpoint", "tensors of other shapes", remedy)
        with torch.no_grad():
            for x, its in zip(tensors, saved, strict=True):
                x.copy_(its)
        return int(step)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
