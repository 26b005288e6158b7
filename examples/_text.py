# SPDX-License-Identifier: Apache-2.0
"""Text at hand and lists to look things up in, as bytes, and a small language model that learns both.

The text is PyTorch's own Python sources, which are on every machine that runs this and are the same for the same
version of PyTorch; a tenth of the files, chosen by their names, is held out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _training import parameter_groups, warm_up_then_decay
from torch import Tensor, nn

from singlepass.optim import AdamW

SOURCES = Path(torch.__file__).parent
FOLDERS = ("distributions", "nn", "optim")
HELD_OUT = 10  # one file in so many

LINE = 4  # bytes of a line, such as b"qTW\n"
VALUE = slice(1, 3)  # where the value stands in it
QUESTION = 3  # bytes of a question, such as b"?q\n"
NAMES = b"abcdefghijklmnopqrstuvwxyz0123456789"  # keys

KEYS = 32  # at most, of a list in training


@dataclass
class Corpus:
    """Bytes of all files one after another, uint8, to train on and held out."""

    train: Tensor
    held_out: Tensor
    files: int
    digest: str


def read_corpus() -> Corpus:
    paths = sorted(path for folder in FOLDERS for path in (SOURCES / folder).rglob("*.py"))
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    digest = hashlib.sha256()
    for path in paths:
        name, text = path.relative_to(SOURCES).as_posix(), path.read_bytes()
        digest.update(name.encode() + b"\0" + text)
        parts[hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0].append(text)
    train, held_out = (torch.frombuffer(bytearray(b"".join(parts[part])), dtype=torch.uint8) for part in (False, True))
    return Corpus(train, held_out, len(paths), digest.hexdigest()[:12])


def windows(text: Tensor, length: int, count: int, generator: torch.Generator) -> Tensor:
    """Pieces of a text from random places, int64 (count, length)."""
    starts = torch.randint(len(text) - length + 1, (count,), generator=generator)
    return text[starts[:, None] + torch.arange(length)].long()


def dictionary(keys: int, generator: torch.Generator, capitals: int = 26) -> Tensor:
    """Lines of a key and a value, two of the first ``capitals``, no key twice: int64 (keys, bytes of a line)."""
    lines = torch.tensor(list(b"...\n")).repeat(keys, 1)
    lines[:, 0] = torch.tensor(list(NAMES))[torch.randperm(len(NAMES), generator=generator)[:keys]]
    lines[:, VALUE] = ord("A") + torch.randint(capitals, (keys, 2), generator=generator)
    return lines


def questions(lines: Tensor) -> Tensor:
    """Asks for lines (..., bytes of a line): int64 (..., bytes of a question)."""
    asked = torch.tensor(list(b"?.\n")).repeat(*lines.shape[:-1], 1)
    asked[..., 1] = lines[..., 0]
    return asked


def lookups(length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A sequence to train on: a dictionary of 2 keys or more, then lines of it again.

    In every other sequence a question goes before each of these. What comes after a byte is learned first, and looking
    keys up only where that does not do: so some lists are of few capitals, and some lines not asked for.

    Returns:
        bytes, int64 (length,), and which of them are values that were said before, bool (length,).
    """
    keys = int(2 * (min(0.8 * length / LINE, KEYS) / 2) ** float(torch.rand((), generator=generator)))
    lines = dictionary(keys, generator, int(torch.randint(2, 27, (), generator=generator)))
    again = lines[torch.randint(keys, (-(-length // LINE),), generator=generator)]
    asks = float(torch.rand((), generator=generator)) < 0.5
    talk = torch.cat((questions(again), again), 1) if asks else again
    known = torch.zeros(keys * LINE + talk.numel(), dtype=torch.bool)
    known[keys * LINE :].view_as(talk)[:, -LINE:][:, VALUE] = True
    return torch.cat((lines.flatten(), talk.flatten()))[:length], known[:length]


def needles(prompts: int, keys: int, capitals: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Dictionaries with a question for one of their lines, int64 (prompts, keys * bytes of a line + of a question), and
    those lines, int64 (prompts, bytes of a line)."""
    lines = torch.stack([dictionary(keys, generator, capitals) for _ in range(prompts)])
    asked = lines[torch.arange(prompts), torch.randint(keys, (prompts,), generator=generator)]
    return torch.cat((lines.flatten(1), questions(asked)), 1), asked


@dataclass(frozen=True)
class Training:
    """What is trained, and how long."""

    steps: int = 2400
    tokens: int = 1536  # of a step
    # Bytes of a sequence, the share of text beside the lists, in a batch and in the loss, and up to which share of the
    # steps. Attention learns to look things up first, and does so soonest in short lists, where there is little else.
    stages: tuple[tuple[int, float, float], ...] = (
        (48, 0.125, 0.45),
        (128, 0.4, 0.65),
        (256, 0.6, 0.85),
        (512, 0.7, 1.0),
    )
    lr: float = 2e-3
    hidden: int = 128
    layers: int = 2
    query_heads: int = 4
    heads: int = 2
    head_dim: int = 64
    seed: int = 2


@dataclass
class Curves:
    """One number for each step."""

    text: list[float] = field(default_factory=list)
    lists: list[float] = field(default_factory=list)


def build(settings: Training) -> Any:
    """A Llama of transformers with a byte for a token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=settings.hidden,
        intermediate_size=2 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.query_heads,
        num_key_value_heads=settings.heads,
        head_dim=settings.head_dim,
        max_position_embeddings=4096,
        initializer_range=settings.hidden**-0.5,  # larger than usual: attention looks at single tokens sooner
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:  # small at first, so that a byte is not lost among what attention adds to it
            for added in (layer.self_attn.o_proj, layer.mlp.down_proj):
                added.weight.mul_(0.1)
    return model


def train(settings: Training, corpus: Corpus, report: Callable[[Curves], None]) -> tuple[nn.Module, Curves]:
    model, curves = build(settings).train(), Curves()
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = AdamW(parameter_groups(model), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = warm_up_then_decay(optimizer, settings.steps)
    for step in range(settings.steps):
        length, share = next(stage[:2] for stage in settings.stages if step < stage[2] * settings.steps)
        count = settings.tokens // length
        texts = max(int(count * share), 1)
        text = windows(corpus.train, length + 1, texts, generator)
        lists = [lookups(length + 1, generator) for _ in range(max(count - texts, 1))]
        tokens = torch.cat((text, torch.stack([tokens for tokens, _ in lists])))
        known = torch.stack([known for _, known in lists])[:, 1:]
        logits = model(tokens[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        of_text, of_lists = losses[:texts].mean(), losses[texts:][known].mean()
        optimizer.zero_grad()
        (share * of_text + (1 - share) * of_lists).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        curves.text.append(of_text.item())
        curves.lists.append(of_lists.item())
        if not math.isfinite(curves.text[-1]):
            raise FloatingPointError(f"training: expected finite losses; got {curves.text[-1]}")
        report(curves)
    return model.eval(), curves
