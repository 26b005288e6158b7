# SPDX-License-Identifier: Apache-2.0
"""What the exam of caches on SmolLM2 found: the table, the criteria and whether they hold, the picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from _kv_rows import INT2, Row, difference, mean_and_error, rows_of
from _report import markdown_section, picture

PC, TRAINED, SEARCHED = "principal components", "trained bases", "trained bases, searched ranks"
# Families of caches by name: how the picture draws them.
STYLES = {
    "zipcache": ("ZipCache", "#0072b2", "o", "-"),
    "uniform": ("per token and head", "#d55e00", "s", ":"),
    "rotated": ("per token and head, rotated", "#e69f00", "D", ":"),
    "kivi": ("KIVI, groups of 32", "#009e73", "^", ":"),
    PC: ("low rank: " + PC, "#999999", "v", "--"),
    TRAINED: ("low rank: " + TRAINED, "#cc79a7", "<", "--"),
    SEARCHED: ("low rank: " + SEARCHED, "#882255", ">", "-"),
    "both": (SEARCHED + ", in few bits", "#000000", "*", "none"),
}
HEAD = ["cache", "bytes", "bits", "times smaller", "loss increase", "answers found"]


def cells(rows: list[Row]) -> list[list[str]]:
    plain, lines = rows[0], []
    for row in rows:
        line = [row.name, f"{row.bytes:.1f}", f"{row.bits:.2f}", f"{plain.bytes / row.bytes:.2f}"]
        line.append("" if row is plain else "{:+.3f} ± {:.3f}".format(*difference(row.losses, plain.losses)))
        line.append("{:.0%} ± {:.0%}".format(*mean_and_error(row.found)).replace("%", " %"))
        lines.append(line)
    return lines


def verdicts(rows: list[Row]) -> list[str]:
    """What was asked for beforehand, and whether it holds."""
    by_name, plain = {row.name: row for row in rows}, rows[0]

    def lost(name: str) -> float:
        return difference(by_name[name].losses, plain.losses)[0]

    lines = []
    for budget, allowed in (("75 %", 0.1), ("50 %", 0.2)):
        share = lost(f"{SEARCHED}, {budget}") / lost(f"{PC}, {budget}")
        holds = "holds" if share <= allowed else "fails"
        lines.append(f"{SEARCHED}, lose at most {allowed:.1f} of what {PC} lose at {budget}: {share:.2f}, {holds}")
    name = f"{SEARCHED}, 50 %, 4/2 bits"
    times = plain.bytes / by_name[name].bytes
    lines.append(f"{name}, is at least 7 times smaller: {times:.1f}, {'holds' if times >= 7 else 'fails'}")
    a, b = lost(name), lost(INT2)
    lines.append(f"it loses less than {INT2}: {a:.2f} against {b:.2f}, {'holds' if a < b else 'fails'}")
    return lines


def facts(result: dict[str, Any]) -> str:
    exam, versions, machine = result["exam"], result["versions"], result["machine"]
    texts, questions = (", ".join(f"{n} of {length:,}" for length, n in exam[k]) for k in ("texts", "questions"))
    return (
        f"SmolLM2-135M-Instruct, help topics of Python {result['python']}; texts: {texts} tokens;\n"
        f"questions: {questions} tokens; bases fitted on texts of {exam['batch']} tokens, trained for {exam['steps']}\n"
        f"steps; {machine['device']}, torch {versions['torch']},\n"
        f"transformers {versions['transformers']}, {result['date'][:10]}"
    )


def markdown(result: dict[str, Any]) -> str:
    """The text between the markers in docs/kv.md."""
    rows = rows_of(result)
    return markdown_section(HEAD, cells(rows), verdicts(rows), facts(result))


def draw(result: dict[str, Any], path: Path) -> None:
    from matplotlib.ticker import PercentFormatter

    plain, *rows = rows_of(result)
    with picture(path, 1, 2, (11.0, 4.8)) as (figure, (left, right)):
        for family, (label, colour, marker, line) in STYLES.items():
            members = sorted((row for row in rows if row.family == family), key=lambda row: row.bytes)
            options: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": line, "label": label}
            for axes, value in (
                (left, lambda row: difference(row.losses, plain.losses)),
                (right, lambda row: mean_and_error(row.found)),
            ):
                means, errors = zip(*map(value, members), strict=True)
                places = [plain.bytes / row.bytes for row in members]
                axes.errorbar(places, means, yerr=errors, capsize=2, linewidth=1.3, markersize=5, **options)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
            axes.set_xlabel("times smaller than 16 bits, everything counted")
            axes.spines[["top", "right"]].set_visible(False)
        left.set_yscale("symlog", linthresh=0.01)
        left.set_ylim(bottom=-0.01)
        left.axhline(0.0, color="#333333", linewidth=1, zorder=0)
        right.axhline(statistics.fmean(plain.found), color="#333333", linewidth=1, zorder=0)
        left.set_title("increase of the loss, nats per token", loc="left", fontweight="bold")
        right.set_title("answers found", loc="left", fontweight="bold")
        right.yaxis.set_major_formatter(PercentFormatter(1.0))
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
