# SPDX-License-Identifier: Apache-2.0
"""The weight of a layer that keeps only factors of it: a copy, which refuses to be written to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._errors import message

CONTRACT = "a weight that is set by set_weight(weight), as it is made of factors"
REMEDY = "Call set_weight. For a tensor of your own take weight.clone(), and for tied weights leave the layer out."

_READING = ("__index__", "__int__", "__invert__")


def _is_write(name: str) -> bool:
    """Whether a function of this name writes to its first argument."""
    if name.startswith("__"):
        return name in ("__setitem__", "__set__") or (name[2] == "i" and name not in _READING)
    return name.endswith("_")


class WeightCopy(Tensor):
    """A tensor that others would write to in vain. What shares its memory is one too; results are plain tensors."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")  # as torch.nn.init calls it
        targets = target if isinstance(target, (list, tuple)) else (target,)
        if _is_write(func.__name__) and any(isinstance(t, cls) for t in targets):
            raise RuntimeError(message("SSTLinear", CONTRACT, f"{func.__name__} of a copy", REMEDY))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            sources = {t.untyped_storage().data_ptr() for t in targets if isinstance(t, cls)}
            if isinstance(result, (list, tuple)) and type(result) in (list, tuple):
                return type(result)(cls._marked(t, sources) for t in result)
            return cls._marked(result, sources)

    @classmethod
    def _marked(cls, result: Any, sources: set[int]) -> Any:
        aliases = isinstance(result, Tensor) and result.numel() and result.untyped_storage().data_ptr() in sources
        return result.as_subclass(cls) if aliases else result

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)
