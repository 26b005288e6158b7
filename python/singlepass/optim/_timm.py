# SPDX-License-Identifier: Apache-2.0
"""The optimizers by name, for timm."""

from __future__ import annotations

import inspect

from .._errors import message


def register_with_timm() -> list[str]:
    """Makes the optimizers known to timm, whose ``create_optimizer_v2`` then takes ``opt="singlepass-lion"``.

    A name is the class's in small letters, after ``singlepass-``. timm's own names keep their meaning. Write the
    hyphen: timm drops what stands before an underscore, and takes its own Lion for ``"singlepass_lion"``. Call it once
    in a training script, before the optimizer is made; further calls change nothing.

    Returns:
        list: the names.

    Raises:
        ImportError: timm is missing, or older than 1.0.12.

    Example:
        >>> import torch
        >>> from timm.optim import create_optimizer_v2
        >>> from singlepass.optim import register_with_timm
        >>> register_with_timm()[:3]
        ['singlepass-lamb', 'singlepass-lars', 'singlepass-adabelief']
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        >>> optimizer = create_optimizer_v2(model, "singlepass-lamb", lr=1e-3, weight_decay=0.1)
        >>> type(optimizer), [group["weight_decay"] for group in optimizer.param_groups]
        (<class 'singlepass.optim._lamb.LAMB'>, [0.0, 0.1])
    """
    try:
        from timm.optim import OptimInfo
        from timm.optim._optim_factory import default_registry
    except ImportError as error:
        remedy = 'Run: pip install --upgrade "timm>=1.0.12".'
        raise ImportError(message("register_with_timm", "timm 1.0.12 or newer", error, remedy)) from error
    from .. import optim  # which imports this module

    names = []
    for cls in (getattr(optim, name) for name in (*optim._OPTIMIZERS, "SST")):
        names.append(f"singlepass-{cls.__name__.lower()}")
        if default_registry.list_optimizers(names[-1]):
            continue
        arguments = inspect.signature(cls).parameters
        betas = arguments["betas"].default if "betas" in arguments else ()
        info = OptimInfo(
            names[-1],
            cls,
            cls.__doc__.partition("\n")[0],
            has_eps="eps" in arguments,
            has_momentum="momentum" in arguments,
            has_betas=bool(betas),
            num_betas=len(betas),
        )
        default_registry.register(info)
    return names
