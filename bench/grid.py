# SPDX-License-Identifier: Apache-2.0
"""A table of text, shown by rich or written as Markdown, and how numbers read in it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Grid:
    title: str
    head: list[str]
    lines: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    numbers: bool = True  # in all columns but the first

    def markdown(self) -> str:
        align = [":--"] + ["--:" if self.numbers else ":--"] * (len(self.head) - 1)
        rows = [self.head, align, *self.lines]
        text = [f"**{self.title}**", "", *(f"| {' | '.join(row)} |" for row in rows)]
        return "\n".join(text + ([""] + [f"{note}  " for note in self.notes] if self.notes else [])) + "\n"


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return "–"
    decimals = max(0, digits - len(str(int(abs(value))))) if abs(value) >= 1 else digits - 1
    return f"{value:,.{decimals}f}"


def size_of(count: int | None) -> str:
    """Bytes in MiB, as memory is allocated."""
    return "–" if count is None else f"{count / 2**20:,.1f} MiB"


def times(value: float | None) -> str:
    """A ratio: two decimals below 10."""
    if value is None:
        return "–"
    return f"{value:.2f}x" if value < 9.995 else f"{value:,.1f}x" if value < 99.95 else f"{value:,.0f}x"
