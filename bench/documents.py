# SPDX-License-Identifier: Apache-2.0
"""Tables and plots written between marker comments of documents."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from . import counted, tables
from .checks import check
from .registry import FAMILIES
from .results import Run, newest, newest_model, newest_proof

NOT_MEASURED = "not measured"

MARKER = re.compile(
    r"(<!-- bench:(?P<name>[\w-]+)(?P<options>(?: [\w-]+=\S+)*) -->\n)(?P<old>.*?)(<!-- /bench -->)", re.S
)


def block(
    name: str,
    options: dict[str, str],
    find: Callable[[str], Run | None],
    draw: Callable[[Run, dict[str, str]], str],
) -> str:
    """The generated text of one marker, whose options name a family. `find` gives the run of a family, or None where
    there is none; `draw` makes a plot and returns the Markdown that shows it."""
    run = find(options["family"])
    if name == "traffic":
        return counted.traffic_grid().markdown()
    if name == "caches":
        return counted.cache_grid().markdown()
    if name == "training-memory":
        return counted.training_grid().markdown()
    if name in ("proof", "predictions", "support"):
        from . import proofs

        grids = {"proof": proofs.proof_grid, "predictions": proofs.predictions_grid, "support": proofs.support_grid}
        return grids[name](newest_proof()).markdown()
    if name == "model":
        from . import predictions

        cuda = [run for run in (newest("cuda", family=options["family"]),) if run is not None]
        return predictions.model_grid(newest_model(), cuda, options["family"], options.get("size")).markdown()
    if name == "fallback":
        from . import predictions

        return predictions.fallback_grid(newest_model()).markdown()
    if name == "summary":
        summary = tables.summary_grid(find)
        found = {family: run for family in FAMILIES if (run := find(family))}
        summary.notes = [f"{family}: {tables.machine_line(run)}" for family, run in found.items()]
        return summary.markdown()
    if run is None:
        return f"{NOT_MEASURED}\n"
    if name == "machine":
        return tables.machine_line(run) + "\n"
    if name == "tokens":
        return tables.token_grid(run).markdown()
    if name == "checks":
        return tables.check_grid(check(run, options["family"])).markdown()
    if name == "plot":
        return draw(run, options) + "\n"
    if name in FAMILIES:
        which = {key: value for key, value in options.items() if key in ("family", "size", "dtype")}
        picked = tables.memory_grids(run, **which) if "memory" in options else tables.grids(run, **which)
        return "\n".join(g.markdown() for g in picked) or f"{NOT_MEASURED}\n"
    raise ValueError(
        "bench table: expected a marker machine, summary, tokens, checks, traffic, caches, training-memory, model, "
        f"fallback, proof, predictions, support, plot, {', '.join(FAMILIES[:-1])} or {FAMILIES[-1]}; got {name!r}. "
        "Correct the marker"
    )


def inject(path: Path, find: Callable[[str, str], Run | None], draw: Callable[[Path, Run, dict[str, str]], str]) -> int:
    """Rewrite every marked block of a file; returns how many there are.

    A marker reads `<!-- bench:NAME device=cpu size=gpt2-small -->` and ends at `<!-- /bench -->`. `find` gives the run
    of a kind of device and a family, or None where there is none.
    """
    found = 0

    def fill(match: re.Match[str]) -> str:
        nonlocal found
        found += 1
        options = dict(option.split("=", 1) for option in match["options"].split())
        name = match["name"]
        options["family"] = name if name in FAMILIES else options.get("family", FAMILIES[0])
        kind = options.get("device", "cpu")
        text = block(name, options, lambda family: find(kind, family), lambda run, chosen: draw(path, run, chosen))
        return match[1] + text + match[5]

    text = MARKER.sub(fill, path.read_text())
    path.write_text(text)
    return found
