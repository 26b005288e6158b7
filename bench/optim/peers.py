# SPDX-License-Identifier: Apache-2.0
"""Optimizers of other packages, with the arguments that make them do the work of ours."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from ..registry import Tier, missing

Params = list[torch.nn.Parameter]


@dataclass(frozen=True)
class Peer:
    """clobbers: the step writes into gradients. Other fields are those of `Provider`."""

    name: str
    make: Callable[[Params], Optimizer]
    why_not: Callable[[torch.device], str | None] = lambda device: None
    differs: str | None = None
    clobbers: bool = True
    column: str = "peer"
    tier: Tier = Tier.PEER
    first_calls: int = 1


@dataclass(frozen=True)
class Kozistr:
    """How pytorch_optimizer is called.

    differs: how its formula differs from ours. foreach_arguments, foreach_differs: the same for its batched path, where
    that one is not to be had with the arguments of the loop.
    """

    name: str
    arguments: dict[str, Any]
    differs: str | None = None
    foreach_arguments: dict[str, Any] | None = None
    foreach_differs: str | None = None


KOZISTR = {
    "Lion": Kozistr("Lion", {}),
    "AdaBelief": Kozistr(
        "AdaBelief",
        {"rectify": True},
        foreach_arguments={"rectify": False},
        foreach_differs="not rectified, which only its loop can be",
    ),
    "Adan": Kozistr("Adan", {}),
    "DiffGrad": Kozistr("DiffGrad", {"weight_decouple": False}, "adds 1e-15 under the root"),
    "LAMB": Kozistr(
        "Lamb",
        {"weight_decouple": False, "pre_norm": True},
        "no bias correction; the norm of a parameter counts as at most 10",
    ),
    "LARS": Kozistr("LARS", {}, "tensors with one dimension take plain SGD steps without weight decay"),
    "SGDSaI": Kozistr("SGDSaI", {}, "momentum starts at zero; other gain for tensors with one dimension"),
}


def kozistr_class(name: str) -> Any:
    return getattr(importlib.import_module("pytorch_optimizer"), name)


def kozistr_reason(name: str, foreach: bool, device: torch.device) -> str | None:
    if reason := missing("pytorch_optimizer", device):
        return reason
    if foreach and "foreach" not in inspect.signature(kozistr_class(name)).parameters:
        return "no foreach in the installed version"
    return None


def kozistr(name: str, arguments: dict[str, Any], params: Params) -> Optimizer:
    return kozistr_class(name)(params, **arguments)


def kozistr_compiled(name: str, arguments: dict[str, Any], params: Params) -> Optimizer:
    create = importlib.import_module("pytorch_optimizer").create_optimizer
    return create(torch.nn.ParameterList(params), name.lower(), wd_ban_list=(), compile=True, **arguments)


def quiet_adabelief(arguments: dict[str, Any], params: Params) -> Optimizer:
    """The official AdaBelief, which prints when it is made."""
    with contextlib.redirect_stdout(io.StringIO()):
        official = importlib.import_module("adabelief_pytorch").AdaBelief
        return official(params, print_change_log=False, **arguments)


def lion(module: str, arguments: dict[str, Any], params: Params) -> Optimizer:
    return importlib.import_module(module).Lion(params, **arguments)


def peers(rule: str, arguments: dict[str, Any]) -> Iterator[Peer]:
    """The peers of one of our optimizers, given the arguments that ours gets."""
    if rule == "AdamW":
        for variant, tier in (("fused", Tier.FUSED), ("foreach", Tier.EAGER)):
            adamw = partial(torch.optim.AdamW, **(arguments | {variant: True}))
            yield Peer(f"torch-{variant}", adamw, clobbers=False, column="torch.optim", tier=tier)
    if rule == "Lion":
        reason = partial(missing, "lion_pytorch")
        for variant, module in (("loop", "lion_pytorch"), ("foreach", "lion_pytorch.foreach")):
            yield Peer(f"lion-pytorch-{variant}", partial(lion, module, arguments), reason, clobbers=False)
    if rule == "AdaBelief":
        yield Peer("adabelief-pytorch", partial(quiet_adabelief, arguments), partial(missing, "adabelief_pytorch"))
    if rule not in KOZISTR:
        return
    peer = KOZISTR[rule]
    loop = arguments | peer.arguments
    batched = arguments | (peer.foreach_arguments or peer.arguments) | {"foreach": True}
    batched_differs = peer.foreach_differs or peer.differs
    for variant, make, differs in (
        ("loop", partial(kozistr, peer.name, loop | {"foreach": False}), peer.differs),
        ("foreach", partial(kozistr, peer.name, batched), batched_differs),
        ("compiled", partial(kozistr_compiled, peer.name, batched), batched_differs),
    ):
        slow: dict[str, Any] = {"tier": Tier.SLOW, "first_calls": 2} if variant == "compiled" else {}
        reason = partial(kozistr_reason, peer.name, variant != "loop")
        yield Peer(f"pytorch_optimizer-{variant}", make, reason, differs, **slow)
