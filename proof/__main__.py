# SPDX-License-Identifier: Apache-2.0
"""`python -m proof {run,bundle}`: prove everything on this machine's GPU, or pack what has to travel to another one."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from counting import cubins

from . import bundle, place, stages
from .stage import NOT_MEASURED, PROVED, REFUTED, run

SCHEMA = 1
SIGNS = {PROVED: "proved", REFUTED: "REFUTED", NOT_MEASURED: "not measured"}
REHEARSAL = 4.0  # how much longer the stages of a rehearsal may take: the interpreter is slow


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand. A proof's exit status: 0 all proved, 1 something refuted, 2 something not measured."""
    parser = argparse.ArgumentParser(prog="python -m proof", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="{run,bundle}")
    sub = commands.add_parser("run", help="prove everything that exists, in under ten minutes")
    sub.set_defaults(command=prove)
    sub.add_argument("--results", type=Path, default=Path("bench/results"), help="the only folder that is written to")
    sub.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, which proves nothing")
    sub.add_argument("--stage", default=None, help=f"some, with commas: {', '.join(s.name for s in stages.STAGES)}")
    quick = ",".join(stages.QUICK)
    sub.add_argument("--quick", dest="stage", action="store_const", const=quick, help="only what was predicted")
    sub = commands.add_parser("bundle", help="pack the tree with its built libraries and what a bare machine lacks")
    sub.set_defaults(command=pack)
    sub.add_argument("--output", type=Path, default=Path("dist", f"{bundle.NAME}.tar.gz"), help="default: %(default)s")
    sub.add_argument("--peers", type=Path, default=None, help="folder with packages of peers that are to travel along")
    arguments = parser.parse_args(argv)
    status: int = arguments.command(arguments)
    return status


def chosen(here: place.Place, names: str | None) -> list[stages.Stage]:
    every = stages.stages_for(here)
    return every if names is None else [stage for stage in every if stage.name in names.split(",")]


def prove(arguments: argparse.Namespace) -> int:
    known = [stage.name for stage in (stages.BUILD, *stages.STAGES)]
    unknown = set((arguments.stage or known[0]).split(",")) - set(known)
    if unknown:
        raise SystemExit(f"proof: expected stages among {', '.join(known)}; got {', '.join(unknown)}. Correct --stage.")
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(f"proof: expected a Python with torch; got {sys.executable}. Name another: make PYTHON=...")
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("proof: expected an NVIDIA GPU; torch sees none. Rehearse with --device cpu.")
    here = place.make(arguments.device, arguments.results)
    sys.path[:0] = [str(here.scratch / "site")]
    try:
        return _prove(here, chosen(here, arguments.stage))
    finally:
        shutil.rmtree(here.scratch, ignore_errors=True)


def _prove(here: place.Place, wanted: list[stages.Stage]) -> int:
    import torch

    from singlepass.bench import results

    machine = results.machine(torch.device(here.device))
    now, commit = datetime.now(timezone.utc), place.commit_of(here.tree)
    stem = here.results / results.slug(machine) / "proof" / f"{now:%Y-%m-%dT%H%M}-{commit.replace('+', '-changed')}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    log = stem.with_name(stem.name + ".log")
    entries: list[dict[str, Any]] = []
    print(f"{'stage':11} {'verdict':13} seconds")
    for stage, outcome in run(wanted, here, log, REHEARSAL if here.device == "cpu" else 1.0):
        print(f"{stage.name:11} {SIGNS[outcome.status]:13} {outcome.seconds:7.1f}  {outcome.said}", flush=True)
        entries.append({"name": stage.name, "title": stage.title} | vars(outcome))
    found = cubins.resources([*here.tree.glob(place.LIBRARIES), *here.triton_cache.rglob("*.cubin")])
    proof = {"schema": SCHEMA, "date": now.isoformat(timespec="seconds"), "commit": commit, "machine": machine}
    proof |= {"versions": results.versions(), "stages": entries, "resources": found}
    path = stem.with_name(stem.name + ".json")
    path.write_text(json.dumps(proof, indent=1) + "\n")
    print_predictions([p for entry in entries for p in entry["facts"].get("predictions", [])])
    print_kernels(found)
    print(f"proof:     {path}\nlog:       {log}")
    return exit_status([entry["status"] for entry in entries])


def print_predictions(found: list[dict[str, Any]]) -> None:
    for p in found:
        measured = p["missing"] if p["measured"] is None else f"{p['measured']:.4g} {p['unit']}"
        print(f"{p['what']}: predicted {p['low']:.4g} to {p['high']:.4g}, measured {measured}")


def print_kernels(found: dict[str, dict[str, dict[str, int]]]) -> None:
    if not found:
        print("registers and spills: not measured, no library for GPUs or no cuobjdump")
    for arch, by_name in found.items():
        most = max(numbers["registers"] for numbers in by_name.values())
        spilling = cubins.spilling({arch: by_name})
        print(f"{arch}: {len(by_name)} kernels, at most {most} registers, {len(spilling)} with local memory")


def exit_status(verdicts: list[str]) -> int:
    return 1 if REFUTED in verdicts else 2 if NOT_MEASURED in verdicts else 0


def pack(arguments: argparse.Namespace) -> int:
    try:
        lines = bundle.make(arguments.output, arguments.peers)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
