# SPDX-License-Identifier: Apache-2.0
"""Text at hand and lists to look things up in, as bytes, and a small language model that learns both.

This repository's documents and sources are the text; a tenth of the files, chosen by their names, is held out.
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
from _digits import parameter_groups, warm_up_then_decay
from torch import Tensor, nn

from singlepass.optim import AdamW

ROOT = Path(__file__).parents[1]
# Not docs/kv.md or docs/spectral.md, nor the examples: they hold what comes of this.
PATTERNS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "python/**/*.py",
    "bench/**/*.py",
    "tests/**/*.py",
    "csrc/**/*.h",
)
LEFT_OUT = ("docs/kv.md", "docs/spectral.md", "docs/examples.md", "tests/examples/")
HELD_OUT = 10  # one file in so many

LINE = 5  # bytes of a line, such as b"qkTW\n"
ANSWER = slice(2, 4)  # where the value stands in a line

KEYS = 10  # at most, of a list in training
JUMPS = 0.5  # of the lines that are said again in training


@dataclass
class Corpus:
    """Bytes of all files one after another, uint8, to train on and held out."""

    train: Tensor
    held_out: Tensor
    files: int
    digest: str


def read_corpus() -> Corpus:
    paths = sorted({path for pattern in PATTERNS for path in ROOT.glob(pattern)})
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    digest = hashlib.sha256()
    files = 0
    for path, name in zip(paths, names, strict=True):
        if not name.startswith(LEFT_OUT):
            text = path.read_bytes()
            digest.update(name.encode() + b"\0" + text)
            parts[hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0].append(text)
            files += 1
    train, held_out = (torch.frombuffer(bytearray(b"".join(parts[part])), dtype=torch.uint8) for part in (False, True))
    return Corpus(train, held_out, files, digest.hexdigest()[:12])


def windows(text: Tensor, length: int, count: int, generator: torch.Generator) -> Tensor:
    """Pieces of a text from random places, int64 (count, length)."""
    starts = torch.randint(len(text) - length + 1, (count,), generator=generator)
    return text[starts[:, None] + torch.arange(length)].long()


def dictionary(keys: int, generator: torch.Generator) -> Tensor:
    """Lines of a key, two letters, and a value, two capitals, no key twice: int64 (keys, bytes of a line)."""
    lines = torch.tensor(list(b"....\n")).repeat(keys, 1)
    chosen = torch.randperm(26 * 26, generator=generator)[:keys]
    lines[:, 0], lines[:, 1] = ord("a") + chosen // 26, ord("a") + chosen % 26
    lines[:, ANSWER] = ord("A") + torch.randint(26, (keys, 2), generator=generator)
    return lines


def lookups(length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A sequence of lines to train on: a dictionary of 2 keys or more, then its lines again, from a random one on, with
    jumps to others.

    Returns:
        bytes, int64 (length,), and which of them follow from what stands before, bool (length,): values said before,
        and keys but those that are jumped to.
    """
    count = -(-length // LINE)
    keys = int(2 * (min(0.8 * count, KEYS) / 2) ** float(torch.rand((), generator=generator)))
    jumps = torch.rand(count - keys, generator=generator) < JUMPS
    jumps[:1] = True
    steps = torch.where(jumps, torch.randint(keys, (count - keys,), generator=generator), 1)
    order = torch.cat((torch.arange(keys), steps.cumsum(0) % keys))
    known = torch.zeros(count, LINE, dtype=torch.bool)
    known[keys:] = ~jumps[:, None]
    known[keys:, ANSWER] = True
    known[:, -1] = False  # the ends of lines teach nothing
    return dictionary(keys, generator)[order].flatten()[:length], known.flatten()[:length]


def needles(prompts: int, keys: int, queries: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Dictionaries, int64 (prompts, keys * bytes of a line), and a quotation from each, lines that follow one another
    from a random one on, int64 (prompts, queries, bytes of a line)."""
    lines = torch.stack([dictionary(keys, generator) for _ in range(prompts)])
    first = torch.randint(keys - queries + 1, (prompts, 1), generator=generator)
    asked = first + torch.arange(queries)
    return lines.flatten(1), lines.gather(1, asked[..., None].expand(-1, -1, LINE))


@dataclass(frozen=True)
class Training:
    """What is trained, and how long."""

    steps: int = 1800
    tokens: int = 1536  # of a step
    # Bytes of a sequence, the share of text beside the lists, and up to which share of the steps. Attention learns to
    # look things up first, and does so soonest in short lists, where there is little else to look at.
    stages: tuple[tuple[int, float, float], ...] = (
        (48, 0.125, 0.5),
        (128, 0.7, 0.65),
        (256, 0.7, 0.85),
        (512, 0.7, 1.0),
    )
    lr: float = 4e-3
    hidden: int = 128
    layers: int = 3
    query_heads: int = 8
    heads: int = 2
    head_dim: int = 32
    seed: int = 0


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
        (of_text + of_lists).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        curves.text.append(of_text.item())
        curves.lists.append(of_lists.item())
        if not math.isfinite(curves.text[-1]):
            raise FloatingPointError(f"training: expected finite losses; got {curves.text[-1]}")
        report(curves)
    return model.eval(), curves
