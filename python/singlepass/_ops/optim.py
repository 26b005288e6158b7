# SPDX-License-Identifier: Apache-2.0
"""Optimizer steps: one op per rule, over lists of tensors, in place.

Every step op takes, in this order, ``params``, ``grads``, one list per state, ``steps`` and ``lr``, then the rule's
hyperparameters and what all rules share by keyword. Lists have one tensor per parameter:

* ``params``: float32, bfloat16, float16 (eager: float64 too), in any mix; dense, without overlap.
* ``grads``: any of these dtypes; the parameter's shape; any strides.
* states: any of these dtypes; the parameter's shape and strides. A list that a rule does not need may be empty.
* ``steps``: float32, 0-dim, on the parameters' device; counts finished steps. Rules that don't count take an empty
  list, unless rounding is stochastic.
* ``lr``: float32 or float64, 0-dim, on the CPU; or float32 on the parameters' device.
* ``seed``: not None rounds bfloat16 parameters stochastically, by Philox with this key and the counter
  (element / 8, id of the tensor, step). ``ids`` then has one int per parameter.
* ``grad_scale``: float32, 0-dim or of one element, on the parameters' device; gradients are divided by it.
* ``found_inf``: likewise; where it is not zero the step changes nothing, the counters included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import NAMESPACE, library


@dataclass(frozen=True)
class Rule:
    """What the schema of a rule's op is made of."""

    name: str
    states: tuple[str, ...]
    hyper: str
    scale: str | None = None  # a scalar of each tensor that the rule reads

    @property
    def op_name(self) -> str:
        return f"{self.name}_step_"

    @property
    def lists(self) -> tuple[str, ...]:
        """Names of the tensor lists between grads and steps."""
        return self.states + ((self.scale,) if self.scale else ())

    @property
    def hyper_names(self) -> tuple[str, ...]:
        return tuple(declaration.split()[-1] for declaration in self.hyper.split(","))

    @property
    def schema(self) -> str:
        states = "".join(f"Tensor({'bcde'[k]}!)[] {name}, " for k, name in enumerate(self.states))
        scale = f"Tensor[] {self.scale}, " if self.scale else ""
        return (
            f"{self.op_name}(Tensor(a!)[] params, Tensor[] grads, {states}{scale}Tensor(f!)[] steps, Tensor lr, *, "
            f"{self.hyper}, bool maximize=False, int? seed=None, int[] ids=[], Tensor? grad_scale=None, "
            "Tensor? found_inf=None) -> ()"
        )


_ADAM = "float beta1, float beta2, float eps, float weight_decay"

RULES = {
    rule.name: rule
    for rule in (
        Rule("adamw", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), _ADAM),
        Rule("lion", ("exp_avg",), "float beta1, float beta2, float weight_decay"),
        Rule(
            "adabelief",
            ("exp_avg", "exp_avg_var", "max_exp_avg_var"),
            f"{_ADAM}, bool decoupled_weight_decay, bool fixed_decay, bool rectify, bool degenerated_to_sgd",
        ),
        Rule(
            "adan",
            ("exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad"),
            "float beta1, float beta2, float beta3, float eps, float weight_decay, bool no_prox",
        ),
        Rule("diffgrad", ("exp_avg", "exp_avg_sq", "previous_grad"), _ADAM),
        Rule("lamb", ("exp_avg", "exp_avg_sq"), f"{_ADAM}, bool always_adapt"),
        Rule("lars", ("momentum_buffer",), "float momentum, float weight_decay, float trust_coefficient, float eps"),
        Rule("sgdsai", ("momentum_buffer",), "float momentum, float weight_decay", scale="gsnr"),
    )
}


def _step_fake(*args: object, **kwargs: object) -> None:
    """A step has no outputs."""


for _rule in RULES.values():
    library.define(_rule.schema, tags=(torch.Tag.needs_exact_strides,))
    torch.library.register_fake(f"{NAMESPACE}::{_rule.op_name}", _step_fake, lib=library)

# One read of all gradients gives what clipping, unscaling and skipping need: a float32 tensor of three numbers, the
# Euclidean norm after unscaling, the divisor that unscales and clips the stored gradients to
# g * min(1, max_norm / (norm + eps)) (max_norm <= 0: only unscales), and 1 if any element is infinite or NaN, else 0.
library.define("grad_norm(Tensor[] grads, *, float max_norm=0.0, float eps=0.0, Tensor? grad_scale=None) -> Tensor")


@torch.library.register_fake(f"{NAMESPACE}::grad_norm", lib=library)
def _grad_norm_fake(
    grads: list[Tensor], *, max_norm: float = 0.0, eps: float = 0.0, grad_scale: Tensor | None = None
) -> Tensor:
    return grads[0].new_empty(3, dtype=torch.float32)


# The traffic of a step without its arithmetic, which benchmarks take as the floor: reads every element of `reads`,
# reads and writes every element of `updates` (which keep their values if all are finite). Contiguous float32 tensors
# of one size, at most three to read and eight to update.
library.define("stream_(Tensor[] reads, Tensor(a!)[] updates) -> ()")


@torch.library.register_fake(f"{NAMESPACE}::stream_", lib=library)
def _stream_fake(reads: list[Tensor], updates: list[Tensor]) -> None:
    """Nothing is returned."""
