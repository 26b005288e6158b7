# SPDX-License-Identifier: Apache-2.0
"""The part of the docstrings that all optimizers share."""

from __future__ import annotations

from typing import TypeVar

_SHARED = """\
        maximize: maximise the objective instead of minimising it.
        capturable: keep ``lr`` in a float32 tensor on the parameters' device, so that a step captured in a CUDA graph
            follows a schedule. Step counts are always on the device.
        state_dtype: dtype of new states: None for float32, ``"param"`` for the parameter's, or torch.float32,
            torch.bfloat16, torch.float16. States of float64 parameters are float64.
        stochastic_rounding: round bfloat16 parameters up or down at random, without bias. The random bits (Philox)
            depend on ``torch.initial_seed()``, step, parameter and element. Other dtypes round to nearest.
        unscale_in_step: whether ``GradScaler`` leaves unscaling and skipping to ``step()``, which costs no pass of its
            own. Pass False for Lightning's and Fabric's clipping in mixed precision, which refuse that.
        backend: ``"native"``, ``"triton"`` or ``"eager"``; an error is raised if it cannot run. None selects the first
            that can.

    Parameters are float32, bfloat16, float16 or float64, with any strides; gradients are dense tensors of the same
    shape, with any strides. Arithmetic is float32 (float64 for float64 parameters).

    Raises:
        ValueError: a hyperparameter outside its range, a complex or repeated parameter, an unknown backend.
        RuntimeError: the chosen backend cannot run here; in ``step()``, a sparse gradient. Nothing is changed.
"""

T = TypeVar("T", bound=type)


def shared_arguments(cls: T) -> T:
    """Replaces ``{shared}`` in the class's docstring. Google style needs the blank line before the next section."""
    if cls.__doc__ is not None:  # python -OO has none
        cls.__doc__ = cls.__doc__.replace("{shared}", _SHARED)
    return cls
