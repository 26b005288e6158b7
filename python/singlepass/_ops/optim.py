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
* ``offsets``: of parameters that are shards, the place of each one's first element in the whole tensor, by which its
  random bits are drawn: one int >= 0 per parameter. None where all parameters are whole.
* ``grad_scale``: float32, 0-dim or of one element, on the parameters' device; gradients are divided by it.
* ``found_inf``: likewise; where it is not zero the step changes nothing, the counters included.

Native steps can also be called by addresses (:meth:`StepOp.at`), which costs the host less than lists of tensors:

* ``like``: any of the parameters, for its device.
* ``layout``: int64, contiguous, (4, parameters), on the CPU: elements; ``ids``; ``offsets``; and dtypes, a byte for
  each of param, grad and states from the lowest on: 0 float32, 1 bfloat16, 2 float16. All lists have one memory order.
* ``tensors``: where the addresses stand, list after list as above, scales and steps included; ``lists`` says how many
  lists there are. With a ``reader``, the address of a C function ``void*(void*)``, what it makes addresses of.

Whoever calls it answers for what stands there.

Rules with norms of whole tensors can make their two passes apart, so that norms of shards are added up in between:

* ``phase``: 0 for a whole step, 1 for the norm pass alone, 2 for the update alone, which counts the step.
* ``norms``: float64, contiguous, (parameters, 2), on the parameters' device; given in phases 1 and 2 only. Phase 1
  writes each tensor's two sums of squares, zeros if ``found_inf`` is not zero; phase 2 reads them. Both phases together
  give the bits of phase 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._errors import require
from .op import Op, define

RULES: dict[str, StepOp] = {}  # by the rule's name


class StepOp(Op):
    """The step of one rule, whose schema is made from what tells rules apart.

    Args:
        rule: its name.
        states: names of the states, one tensor per parameter each.
        hyper: hyperparameters as in a schema.
        scale: the name of a scalar of each tensor that the rule reads.
        counts: whether the rule reads the number of the step.
        has_norms: whether its update needs norms of whole tensors, which a pass of their own computes.
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
        has_norms: bool = False,
        used_by: str,
    ) -> None:
        self.rule, self.states, self.scale, self.counts, self.has_norms = rule, states, scale, counts, has_norms
        self.lists = states + ((scale,) if scale else ())  # between grads and steps
        self.hyper = {name: kind for kind, name in map(str.split, hyper.split(","))}  # "float" or "bool", by name
        lists = "".join(f"Tensor({'bcde'[k]}!)[] {name}, " for k, name in enumerate(states))
        scaling = "Tensor? grad_scale=None, Tensor? found_inf=None"
        scaling += ", Tensor(g!)? norms=None, int phase=0" if has_norms else ""
        super().__init__(
            "optim",
            f"{rule}_step_(Tensor(a!)[] params, Tensor[] grads, {lists}{f'Tensor[] {scale}, ' if scale else ''}"
            f"Tensor(f!)[] steps, Tensor lr, *, {hyper}, bool maximize=False, int? seed=None, int[] ids=[], "
            f"int[] offsets=[], {scaling}) -> ()",
            None,
            f"One step of {used_by} over lists of tensors, in place.",
            used_by=used_by,
        )
        define(
            f"{self.name}.at(Tensor(a!) like, Tensor layout, Tensor lr, *, int tensors, int lists, {hyper}, "
            f"int reader=0, bool maximize=False, int? seed=None, {scaling}) -> ()"
        )
        RULES[rule] = self

    def at(self) -> Callable[..., None]:
        """The native step that takes addresses in the place of lists."""
        overload: Callable[..., None] = self.overload.overloadpacket.at
        return overload

    def check_shards(
        self, params: Sequence[Tensor], seed: int | None, offsets: Sequence[int], norms: Tensor | None, phase: int
    ) -> None:
        """Refuses offsets and norms that do not fit, before anything is changed."""

        def check(condition: bool, contract: str, got: object, remedy: str) -> None:
            require(condition, self.name, contract, got, remedy)

        if seed is not None and offsets:
            check(len(offsets) == len(params), f"{len(params)} offsets", len(offsets), "Pass one for each, or none.")
            remedy = "Count elements from the whole tensor's first."
            check(min(offsets) >= 0, "offsets of 0 or more", min(offsets), remedy)
        check(phase in (0, 1, 2), "phase 0, 1 or 2", phase, "Leave it at 0 for a whole step.")
        misplaced = norms is not None if phase == 0 else norms is None
        if misplaced:  # torch.compile may not know the phase, and puts into no text what it does not know
            got = f"{'none' if norms is None else 'some'} in phase {phase}"
            check(False, "norms in phases 1 and 2, and only there", got, "Pass one tensor to both.")
        if norms is not None:
            contract, got = f"norms of shape ({len(params)}, 2)", f"{norms.dtype} of shape {tuple(norms.shape)}"
            fits = norms.dtype == torch.float64 and norms.shape == (len(params), 2) and norms.is_contiguous()
            check(fits, f"contiguous float64 {contract}", got, "Use torch.empty.")
            if params:
                check(
                    norms.device == params[0].device, f"norms on {params[0].device}", norms.device, "Move them there."
                )


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
lamb = StepOp("lamb", ("exp_avg", "exp_avg_sq"), f"{_ADAM}, bool always_adapt", has_norms=True, used_by="`optim.LAMB`")
lars = StepOp(
    "lars",
    ("momentum_buffer",),
    "float momentum, float weight_decay, float trust_coefficient, float eps",
    counts=False,
    has_norms=True,
    used_by="`optim.LARS`",
)
sgdsai = StepOp(
    "sgdsai", ("momentum_buffer",), "float momentum, float weight_decay", scale="gsnr", used_by="`optim.SGDSaI`"
)

grad_squares = Op(
    "optim",
    "grad_squares(Tensor[] grads) -> Tensor",
    lambda grads: grads[0].new_empty(1, dtype=torch.float64),
    """The sum of squares of all gradients as they are stored, in float64, of shape (1,): infinite or NaN if, and only
    if, an element is. Sums of shards and of devices add up.""",
    used_by="norms of gradients on several ranks",
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
