# SPDX-License-Identifier: Apache-2.0
"""Train a small language model and measure what it loses when its KV cache is compressed.

    pip install ".[examples,kv]" optimum-quanto
    python examples/compress_kv_text.py

A byte-level Llama with grouped-query attention is trained on text (PyTorch's own sources) and on looking up values in
lists. Each kind of cache is then prefilled with the same prompts, and what follows is read byte by byte. The table
shows the loss, how often a value is found, and the memory of each cache.

The lookup task is the line retrieval of ZipCache's paper: the question ends the prompt, the whole prompt is compressed,
and the answer is read from the codes. The criteria were fixed before any compressed cache was evaluated: ZipCache with
60 % in 4 bits finds more values than uniform 2 bits, by more than two standard errors of the difference per list, and
differs from uniform 4 bits by at most two. The block size of regular tokens was chosen on other seeds.

--docs writes docs/kv.md and docs/images/kv-quality.svg from the result file and stores it in examples/results/.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from _kv_rows import PAPER, PLAIN, Row, comparisons, difference, mean_and_error, rows_of, verdict
from _report import OUTPUT, RESULTS, ROOT, fill_in, markdown_section, picture, provenance, rich_table, save
from _text import VALUE, Curves, Training, build, needles, read_corpus, train, windows
from _training import progress_bar
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console
    from rich.table import Table

NAME = "compress_kv_text"
KEPT = RESULTS / f"{NAME}.json"
DOCUMENT, PICTURE = ROOT / "docs" / "kv.md", ROOT / "docs" / "images" / "kv-quality.svg"

# Families of caches by name: how a picture draws them.
STYLES = {
    "zipcache": ("ZipCache, 0 to 100 % in 4 bits, the rest in 2", "#0072b2", "o", "-"),
    "uniform": ("per token and head", "#d55e00", "s", ":"),
    "rotated": ("per token and head, rotated", "#e69f00", "D", ":"),
    "kivi": ("KIVI, groups of 32", "#009e73", "^", ":"),
}


@dataclass(frozen=True)
class Scheme:
    """A kind of cache. ``make`` takes the model's config and how many tokens may wait uncompressed."""

    name: str
    family: str
    make: Callable[[Any, int], Any]


@dataclass(frozen=True)
class Exam:
    """What all schemes are put to.

    A text follows its prompt. A list is a prompt of ``keys`` lines and a question for one of them: 32 * 4 + 3 bytes,
    all of them compressed before the answer. Probes of saliency are 5 % of them, the 7 newest, which are the question
    and the list's last line, and as many of the others. The answer repeats the key, which is given; a value is found
    if both its bytes are the likeliest: by chance, one in 16.
    """

    texts: int = 128
    prompt: int = 384
    follow: int = 96  # bytes of text after the prompt
    lists: int = 1024
    keys: int = 32
    capitals: int = 4  # in values: each is in many lines, so that only the key tells which value it begins
    window: int = 64
    batch: int = 32
    seed: int = 3


def schemes() -> list[Scheme]:
    from transformers import DynamicCache, QuantizedCache

    from singlepass.kv import Codec, ZipCache

    def compressed(name: str, family: str, codec: Codec, ratio: float, bits: int = 4) -> Scheme:
        def make(config: Any, window: int) -> Any:
            return ZipCache(config, ratio, salient_bits=bits, codec=codec, window=window)

        return Scheme(name, family, make)

    def quanto(bits: int) -> Scheme:
        def make(config: Any, window: int) -> Any:
            return QuantizedCache("quanto", config, bits, q_group_size=min(64, config.head_dim), residual_length=window)

        return Scheme(f"QuantizedCache (quanto), {bits} bits", "quanto", make)

    flat, rotated, own, kivi = Codec.per_token_head(), Codec.per_token_head(rotate=True), Codec.zipcache(), Codec.kivi()
    found = [Scheme(PLAIN, "plain", lambda config, window: DynamicCache(config=config))]
    found += [compressed(f"{bits} bits, per token and head", "uniform", flat, 1.0, bits) for bits in (8, 4, 2)]
    found += [compressed(f"{bits} bits, per token and head, rotated", "rotated", rotated, 1.0, bits) for bits in (4, 2)]
    found.append(compressed("ZipCache's codec, all in 4 bits", "zipcache", own, 1.0))
    found += [compressed(f"ZipCache, {ratio} %", "zipcache", own, ratio / 100) for ratio in (80, 60, 40, 20)]
    found.append(compressed("ZipCache's codec, all in 2 bits", "zipcache", own, 0.0))
    found.append(compressed(f"{PAPER}, regular blocks of 16", "blocks", Codec(regular_block=16), 0.6))
    found.append(compressed(f"{PAPER}, blocks of 128", "blocks", Codec(regular_block=128), 0.6))
    found += [compressed(f"KIVI, {bits} bits, groups of 32", "kivi", kivi, 1.0, bits) for bits in (4, 2)]
    if importlib.util.find_spec("optimum") and importlib.util.find_spec("optimum.quanto"):
        found += [quanto(bits) for bits in (4, 2)]
    return found


@torch.no_grad()
def read_on(model: Any, scheme: Scheme, prompt: Tensor, follow: Tensor, window: int) -> tuple[Tensor, int | None]:
    """Prefills a prompt, then reads what follows one byte at a time.

    Returns:
        the losses of all bytes that follow but the first, which the prefill itself foretells, and the bytes of the
        cache after the prompt, if it tells.
    """
    native = scheme.family not in ("plain", "quanto")
    model.set_attn_implementation("singlepass" if native else "sdpa")
    cache = scheme.make(model.config, window)
    model(prompt, cache=cache, logits_to_keep=1)
    nbytes = cache.nbytes if native else None
    if scheme.family == "plain":
        nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    logits = [model(follow[:, i : i + 1], cache=cache).logits for i in range(follow.shape[1] - 1)]
    return torch.cat(logits, 1), nbytes


def examine(model: Any, scheme: Scheme, exam: Exam, held_out: Tensor, report: Callable[[], None]) -> Row:
    start, config, row = time.perf_counter(), model.config, Row(scheme.name, scheme.family, None, None)
    generator = torch.Generator().manual_seed(exam.seed)
    texts = windows(held_out, exam.prompt + exam.follow, exam.texts, generator)
    prompts, asked = needles(exam.lists, exam.keys, exam.capitals, generator)
    for some in texts.split(exam.batch):
        follow = some[:, exam.prompt :]
        logits, nbytes = read_on(model, scheme, some[:, : exam.prompt], follow, exam.window)
        row.losses += F.cross_entropy(logits.transpose(1, 2), follow[:, 1:], reduction="none").mean(1).tolist()
        if nbytes is not None:
            row.bytes = nbytes / (some.shape[0] * exam.prompt * config.num_hidden_layers * config.num_key_value_heads)
            row.bits = 8 * row.bytes / (2 * config.head_dim)
        report()
    for prompt, lines in zip(prompts.split(exam.batch), asked.split(exam.batch), strict=True):
        logits, _ = read_on(model, scheme, prompt, lines[:, : VALUE.stop], exam.window)
        row.found += (logits.argmax(2) == lines[:, VALUE]).all(1).int().tolist()
        report()
    row.losses = [round(x, 5) for x in row.losses]
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def learn(settings: Training, checkpoint: Path, reuse: bool, console: Console) -> tuple[nn.Module, dict[str, Any]]:
    """The model and how its training went."""
    if reuse:
        saved = torch.load(checkpoint, weights_only=True)
        model = build(Training(**saved["settings"])).eval()
        model.load_state_dict(saved["weights"])
        return model, saved["training"]
    corpus, start = read_corpus(), time.perf_counter()
    with progress_bar(console, width=48) as progress:
        task = progress.add_task("", total=settings.steps)

        def report(curves: Curves) -> None:
            text = f"training: loss {curves.text[-1]:.3f} on text, {curves.lists[-1]:.3f} on lists"
            progress.update(task, advance=1, description=text)

        model, curves = train(settings, corpus, report)
    last = slice(-max(settings.steps // 20, 1), None)
    training: dict[str, Any] = {
        "settings": json.loads(json.dumps(asdict(settings))),
        "parameters": sum(p.numel() for p in model.parameters()),
        "files": corpus.files,
        "train_bytes": len(corpus.train),
        "held_out_bytes": len(corpus.held_out),
        "corpus_sha256": corpus.digest,
        "text_loss": round(statistics.fmean(curves.text[last]), 4),
        "list_loss": round(statistics.fmean(curves.lists[last]), 4),
        "seconds": round(time.perf_counter() - start, 1),
    }
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"settings": asdict(settings), "weights": model.state_dict(), "training": training}, checkpoint)
    return model, training


def examine_all(model: nn.Module, exam: Exam, chosen: list[Scheme], console: Console) -> list[Row]:
    held_out, rows = read_corpus().held_out, []
    pieces = -(-exam.texts // exam.batch) + -(-exam.lists // exam.batch)
    with progress_bar(console, width=48) as progress:
        task = progress.add_task("", total=pieces * len(chosen))
        for scheme in chosen:
            progress.update(task, description=scheme.name)
            rows.append(examine(model, scheme, exam, held_out, lambda: progress.update(task, advance=1)))
    return rows


HEAD = ["cache", "bytes", "bits", "loss", "loss increase", "values found"]


def amount(value: float | None, digits: int) -> str:
    return "not counted" if value is None else f"{value:.{digits}f}"


def cells(rows: list[Row]) -> list[list[str]]:
    plain, lines = rows[0], []
    for row in rows:
        line = [row.name, amount(row.bytes, 1), amount(row.bits, 2), f"{statistics.fmean(row.losses):.4f}"]
        line.append("" if row is plain else "{:+.4f} ± {:.4f}".format(*difference(row.losses, plain.losses)))
        line.append("{:.1%} ± {:.1%}".format(*mean_and_error(row.found)).replace("%", " %"))
        lines.append(line)
    return lines


def facts(result: dict[str, Any]) -> str:
    training, exam, versions = result["training"], result["exam"], result["versions"]
    return (
        f"{training['parameters']:,} parameters, {training['settings']['steps']:,} steps; {exam['texts']} texts, "
        f"{exam['lists']} lists of {exam['keys']} lines;\n{result['machine']['device']}, "
        f"threads: {result['machine']['threads']}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"seed {training['settings']['seed']}, {result['date'][:10]}"
    )


def markdown(result: dict[str, Any]) -> str:
    """The text between the markers in docs/kv.md."""
    rows = rows_of(result)
    return markdown_section(HEAD, cells(rows), [*comparisons(rows), verdict(rows)], facts(result))


def tabulate(result: dict[str, Any]) -> Table:
    caption = "bytes per token and head; bits per element; loss in nats per byte; ± one standard error"
    return rich_table("What a compressed cache loses", caption, HEAD, cells(rows_of(result)))


def draw_panel(axes: Axes, rows: list[Row], value: Callable[[Row], tuple[float, float]]) -> None:
    for family, (label, colour, marker, line) in STYLES.items():
        members = [row for row in rows if row.family == family]
        means, errors = zip(*map(value, members), strict=True)
        style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": line, "label": label, "capsize": 2}
        axes.errorbar([row.bits for row in members], means, yerr=errors, linewidth=1.4, markersize=5, **style)
    for row in rows:
        if row.family == "quanto":
            axes.axhline(value(row)[0], color="#8c8c8c", linestyle="--" if "4" in row.name else ":", label=row.name)
        elif row.family == "blocks":
            marker = "v" if "128" in row.name else "x"
            axes.plot(row.bits, value(row)[0], color="#56b4e9", marker=marker, label=row.name)
    paper = next(row for row in rows if row.name == PAPER)
    axes.annotate("60 %", (paper.bits, value(paper)[0]), (0, 8), textcoords="offset points", ha="center", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("bits per element, everything counted")


def draw(result: dict[str, Any], path: Path) -> None:
    from matplotlib.ticker import PercentFormatter

    plain, *rows = rows_of(result)
    with picture(path, 1, 2, (11.0, 4.6)) as (figure, (left, right)):
        draw_panel(left, rows, lambda row: difference(row.losses, plain.losses))
        draw_panel(right, rows, lambda row: mean_and_error(row.found))
        for axes, level in ((left, 0.0), (right, statistics.fmean(plain.found))):
            axes.axhline(level, color="#333333", linewidth=1, zorder=0, label=PLAIN)
        left.set_title("increase of the loss on held-out text", loc="left", fontweight="bold")
        left.set_ylabel("nats per byte")
        right.set_title("values found in a list", loc="left", fontweight="bold")
        right.yaxis.set_major_formatter(PercentFormatter(1.0))
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)


def write_docs(result: dict[str, Any]) -> None:
    fill_in(DOCUMENT, NAME, markdown(result))
    draw(result, PICTURE)
    save(result, KEPT)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"the result file (default: {NAME}.json in {OUTPUT.name}/)")
    parser.add_argument("--quick", action="store_true", help="a few steps and inputs: to see that everything runs")
    parser.add_argument("--steps", type=int, default=Training.steps, help="of training (default: %(default)s)")
    parser.add_argument("--reuse", action="store_true", help="take the weights that lie beside the result file")
    parser.add_argument("--docs", action="store_true", help="only fill docs/kv.md and its picture from the result file")
    args = parser.parse_args(argv)
    path = args.out or OUTPUT / (f"{NAME}_quick.json" if args.quick else f"{NAME}.json")
    checkpoint = path.with_suffix(".pt")
    if path.suffix != ".json":
        parser.error(f"--out: expected a name that ends in .json; got {path}")
    if args.steps < 1:
        parser.error(f"--steps: expected at least 1; got {args.steps}")
    for option, needed in (("docs", path), ("reuse", checkpoint)):
        if getattr(args, option) and not needed.exists():
            parser.error(f"--{option}: expected {needed}; got no such file. Run it without --{option} first")
    if args.docs:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        write_docs(result)
        return result

    from rich.console import Console

    torch.set_num_threads(1)  # the same results on any number of cores
    console, start = Console(), time.perf_counter()
    settings, exam = Training(steps=args.steps), Exam()
    if args.quick:
        settings = Training(steps=4, tokens=256, hidden=64, layers=2)
        exam = Exam(texts=2, prompt=80, follow=16, lists=2, keys=14, window=8, batch=2)
    model, training = learn(settings, checkpoint, args.reuse, console)
    result = provenance() | {"training": training, "exam": asdict(exam)}
    result["rows"] = [asdict(row) for row in examine_all(model, exam, schemes(), console)]
    result["seconds"] = round(time.perf_counter() - start, 1)
    save(result, path)
    console.print(tabulate(result))
    console.print(*comparisons(rows_of(result)), verdict(rows_of(result)), sep="\n")
    draw(result, path.with_suffix(".svg"))
    console.print(f"{path} and {path.with_suffix('.svg').name} written; {result['seconds']:.0f} s in all")
    return result


if __name__ == "__main__":
    main()
