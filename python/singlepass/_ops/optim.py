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

import torch

from .op import Op

RULES: dict[str, StepOp] = {}  # by the rule's name


class StepOp(Op):
    """The step of one rule, whose schema is made from what tells rules apart.

    Args:
        rule: its name.
        states: names of the states, one tensor per parameter each.
        hyper: hyperparameters as in a schema.
        scale: the name of a scalar of each tensor that the rule reads.
        counts: whether the rule reads the number of the step.
        used_by: the class.
    """

    def __init__(
        self,
        rule: str,
        states: tuple[str, ...],
        hyper: str,
        *,
        scale: str | None = None,
        counts: bool = True,
        used_by: str,
    ) -> None:
        self.rule, self.states, self.scale, self.counts = rule, states, scale, counts
        self.lists = states + ((scale,) if scale else ())  # between grads and steps
        self.hyper = {name: kind for kind, name in map(str.split, hyper.split(","))}  # "float" or "bool", by name
        lists = "".join(f"Tensor({'bcde'[k]}!)[] {name}, " for k, name in enumerate(states))
        super().__init__(
            "optim",
            f"{rule}_step_(Tensor(a!)[] params, Tensor[] grads, {lists}{f'Tensor[] {scale}, ' if scale else ''}"
            f"Tensor(f!)[] steps, Tensor lr, *, {hyper}, bool maximize=False, int? seed=None, int[] ids=[], "
            "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()",
            None,
            f"One step of {used_by} over lists of tensors, in place.",
            used_by=used_by,
        )
        RULES[rule] = self


_ADAM = "float beta1, float beta2, float eps, float weight_decay"

adamw = StepOp("adamw", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), _ADAM, used_by="`optim.AdamW`")
lion = StepOp(
    "lion", ("exp_avg",), "float beta1, float beta2, float weight_decay", counts=False, used_by="`optim.Lion`"
)
adabelief = StepOp(
    "adabelief",
    ("exp_avg", "exp_avg_var", "max_exp_avg_var"),
    f"{_ADAM}, bool decoupled_weight_decay, bool fixed_decay, bool rectify, bool degenerated_to_sgd",
    used_by="`optim.AdaBelief`",
)
adan = StepOp(
    "adan",
    ("exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad"),
    "float beta1, float beta2, float beta3, float eps, float weight_decay, bool no_prox",
    used_by="`optim.Adan`",
)
diffgrad = StepOp("diffgrad", ("exp_avg", "exp_avg_sq", "previous_grad"), _ADAM, used_by="`optim.DiffGrad`")
lamb = StepOp("lamb", ("exp_avg", "exp_avg_sq"), f"{_ADAM}, bool always_adapt", used_by="`optim.LAMB`")
lars = StepOp(
    "lars",
    ("momentum_buffer",),
    "float momentum, float weight_decay, float trust_coefficient, float eps",
    counts=False,
    used_by="`optim.LARS`",
)
sgdsai = StepOp(
    "sgdsai", ("momentum_buffer",), "float momentum, float weight_decay", scale="gsnr", used_by="`optim.SGDSaI`"
)

grad_norm = Op(
    "optim",
    "grad_norm(Tensor[] grads, *, float max_norm=0.0, float eps=0.0, Tensor? grad_scale=None) -> Tensor",
    lambda grads, **_: grads[0].new_empty(3, dtype=torch.float32),
    """One read of all gradients gives what clipping, unscaling and skipping need: a float32 tensor of three numbers,
    the Euclidean norm after unscaling, the divisor that unscales and clips the stored gradients to
    g * min(1, max_norm / (norm + eps)) (max_norm <= 0: only unscales), and 1 if any element is infinite or NaN, else
    0.""",
    used_by="gradient clipping, non-finite check",
)

stream_ = Op(
    "optim",
    "stream_(Tensor[] reads, Tensor(a!)[] updates) -> ()",
    None,
    """The traffic of a step without its arithmetic, which benchmarks take as the floor: reads every element of `reads`,
    reads and writes every element of `updates` (which keep their values if all are finite). Contiguous float32 tensors
    of one size, at most three to read and eight to update.""",
    used_by="benchmarks only",
    dtypes="fp32",
    has_triton=False,
)
