# SPDX-License-Identifier: Apache-2.0
"""Results for each kind of cache, and which differences are more than noise."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

PLAIN, PAPER, INT4, INT2 = "uncompressed", "ZipCache, 60 %", "4 bits, per token and head", "2 bits, per token and head"
WITHIN = "within noise"


@dataclass
class Row:
    """Results of one scheme: a loss for each text, and for each list whether its value was found."""

    name: str
    family: str
    bytes: float | None  # per token and head, keys and values, after a prompt
    bits: float | None  # per element
    losses: list[float] = field(default_factory=list)  # nats per byte of text
    found: list[int] = field(default_factory=list)  # 1 where the value that is asked for is found, 0 elsewhere
    seconds: float = 0.0


def rows_of(result: dict[str, Any]) -> list[Row]:
    return [Row(**row) for row in result["rows"]]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), error


def difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """The mean of a - b, input by input, and its standard error."""
    return mean_and_error([x - y for x, y in zip(a, b, strict=True)])


def noise(found: tuple[float, float]) -> str:
    """Whether a mean difference could be chance: noise is two of its standard errors."""
    return WITHIN if abs(found[0]) <= 2 * found[1] else "more than noise"


def comparisons(rows: list[Row]) -> list[str]:
    """ZipCache at the paper's setting beside uniform bits, input by input."""
    by_name, lines = {row.name: row for row in rows}, []
    for other in (INT2, INT4, "ZipCache's codec, all in 4 bits"):
        a, b = by_name[PAPER], by_name[other]
        loss, found = difference(a.losses, b.losses), difference(a.found, b.found)
        of_loss = f"loss {loss[0]:+.4f} ± {loss[1]:.4f} ({noise(loss)})"
        of_found = f"values found {100 * found[0]:+.1f} ± {100 * found[1]:.1f} points ({noise(found)})"
        lines.append(f"{PAPER}, minus {other}: {of_loss}, {of_found}")
    return lines


def verdict(rows: list[Row]) -> str:
    """What was asked for beforehand, and whether it holds."""
    paper, two, four = (next(row.found for row in rows if row.name == name) for name in (PAPER, INT2, INT4))
    more, other = difference(paper, two), difference(paper, four)
    holds = more[0] > 0 and noise(more) != WITHIN and noise(other) == WITHIN
    asked = f"{PAPER}, finds more values than 2 bits, and as many as 4 bits within noise"
    return f"{asked}: {'holds' if holds else 'fails'}"
