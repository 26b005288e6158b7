# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import message, require
from .._ops import Op
from .._ops import spectral as ops
from ..optim import AdamW
from ..optim._base import Bucket, Work
from ..optim._exchange import Exchange
from ._decompose import decompose, drift
from ._draw import draw_vectors, draws_of
from ._linear import SSTLinear, frozen_parameters, layers_by_parameter, rank_of
from ._loading import SSTLoading
from ._parameters import VECTORS, LayerParameters
from ._schedule import PROGRESS, SAMPLINGS, Progress, check_schedule, warmup_factor

# What a copy of the optimizer takes along beside what every optimizer does.
_SETTINGS = (
    "_parameters",
    "_is_unsure",
    "progress",
    "steps_per_iteration",
    "iterations_per_round",
    "warmup_steps",
    "warmup_shape",
    "warmup_all",
    "sampling",
    "project",
    "decay_vectors",
    "reset_singular_values",
    "rank_schedule",
    "tolerance",
    "seed",
)


def _unnamed(entry: Any) -> Any:
    """The parameter of an entry of ``named_parameters()``, or the entry itself."""
    return entry[1] if isinstance(entry, tuple) else entry


class SST(AdamW):
    r"""Sparse spectral training of a model's :class:`SSTLinear` layers, and AdamW for all its other parameters.

    Training is divided into rounds of ``iterations_per_round`` iterations of ``steps_per_iteration`` steps (the paper's
    T2 and T3; T1, the number of rounds, is the length of training). In each iteration every layer trains the ``rank``
    singular vectors that were drawn for it, and all its singular values:

    .. math::
        s &\leftarrow \max(\mathrm{AdamW}(s, \partial L / \partial s), 0) \\
        u_i &\leftarrow \mathrm{normalise}(\mathrm{AdamW}(u_i, G v_i)), \quad
        v_i \leftarrow \mathrm{normalise}(\mathrm{AdamW}(v_i, G^\top u_i))

    At the end of an iteration the vectors' moments are reset, and others are drawn without replacement, with the
    probabilities of ``sampling``. At the end of a round, layers whose vectors deviate from orthonormal by more than
    ``tolerance`` are decomposed again, without changing their weights. Both happen at the end of ``step()``.

    Args:
        params: a model; or parameters, or groups of them, as for any optimizer. An optimizer needs all parameters of a
            layer.
        lr: learning rate of vectors, singular values and everything else.
        betas: decay rates of the two moments.
        eps: added to the square root of the second moment.
        weight_decay: decoupled weight decay, times ``lr``, of singular values and of other parameters.
        steps_per_iteration: T3.
        iterations_per_round: T2; None: the largest k / rank among the layers, rounded up, so that a round can train
            every vector.
        warmup_steps: steps at the start of each iteration, including the first, in which the learning rate of vectors
            rises from ``lr / warmup_steps`` to ``lr``.
        warmup_shape: "linear", or "cosine" for half a wave.
        warmup_all: whether the warm-up also applies to singular values and other parameters.
        sampling: probabilities of vectors: "mixed" is (1 / k + s_i / sum(s)) / 2, as in the paper's experiments;
            "singular_values" is s_i / sum(s), as in its text; "uniform" is 1 / k.
        reset_singular_values: whether the moments of singular values are reset with those of vectors. They are always
            reset if a layer is decomposed again.
        project: whether the component along the vector is first removed from a vector's gradient. Normalising undoes
            it anyway, but the moments would see it. The paper's algorithm has no such step.
        decay_vectors: whether weight decay applies to vectors as well, before they are normalised.
        rank_schedule: ``rank_schedule(draw)`` returns the rank (or fraction) of all layers for iteration ``draw``,
            counted from 0 over all rounds; None: constant. A change of rank changes the shapes of parameters, which
            DistributedDataParallel does not support.
        tolerance: largest deviation from orthonormal, the maximum of ``|U U^T - I|`` and ``|V V^T - I|``, at which a
            layer is not decomposed again.
        seed: of the draws, and of stochastic rounding. Use the same for all ranks of a data-parallel job, so that they
            draw the same vectors.
        maximize: maximise the objective instead of minimising it.
        state_dtype: dtype of new states: None for float32, ``"param"`` for the parameter's, or a dtype.
        stochastic_rounding: round bfloat16 parameters up or down at random, without bias, so that small updates are
            not lost: for models in pure bfloat16. Layers in float32 with ``frozen_dtype=torch.bfloat16`` under
            ``torch.autocast`` round nothing that is trained, and need little more memory.
        unscale_in_step: whether ``GradScaler`` leaves unscaling and skipping to ``step()``. Pass False for Lightning's
            and Fabric's clipping in mixed precision.
        backend: ``"native"``, ``"triton"`` or ``"eager"``; an error is raised if it cannot run. None selects the first
            that can.

    Steps that a GradScaler skips count for the schedule, unless it unscales itself. Groups have an entry
    ``sst_progress``, the position in the schedule: with the model's state dict, training resumes bit for bit at any
    step, in whatever order the optimizer is made, and both state dicts are loaded. The first draw is made in the
    constructor, but for layers that have been drawn already, as those of a loaded model: their vectors go on being
    trained.

    Given a model, the optimizer follows parameters that are replaced, as ``load_state_dict(assign=True)`` does it.
    Given parameters, it follows those of its layers alone.

    Raises:
        ValueError: a hyperparameter outside its range, no layer to train, a part of a layer, parameters that are
            DTensors; in ``step()``, what ``rank_schedule`` returns. Nothing is changed.
        RuntimeError: the chosen backend cannot run here; in ``step()``, a sparse gradient, or a layer that is not
            finite at the end of a round.

    Source: Zhao et al., "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks", ICML
    2025, arXiv 2405.15481, Algorithm 1. Choices that the paper leaves open are arguments.

    Example:
        >>> import torch
        >>> from singlepass import spectral
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> model = spectral.convert(model, rank=4, skip=["2"])
        >>> optimizer = spectral.SST(model, lr=1e-3, steps_per_iteration=50)
        >>> model(torch.randn(16, 64)).square().mean().backward()
        >>> optimizer.step()
    """

    _loading = SSTLoading

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        steps_per_iteration: int = 200,
        iterations_per_round: int | None = None,
        warmup_steps: int = 20,
        warmup_shape: str = "linear",
        warmup_all: bool = False,
        sampling: str = "mixed",
        reset_singular_values: bool = False,
        project: bool = False,
        decay_vectors: bool = False,
        rank_schedule: Callable[[int], float] | None = None,
        tolerance: float = 1e-5,
        seed: int = 0,
        maximize: bool = False,
        state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        unscale_in_step: bool = True,
        backend: str | None = None,
    ) -> None:
        check_schedule(steps_per_iteration, iterations_per_round, warmup_steps, warmup_shape, sampling)
        flags = {"warmup_all": warmup_all, "reset_singular_values": reset_singular_values}
        for name, flag in (flags | {"project": project, "decay_vectors": decay_vectors}).items():
            require(isinstance(flag, bool), "SST", f"{name} True or False", repr(flag), "Pass one of them.")
        fits = rank_schedule is None or callable(rank_schedule)
        require(fits, "SST", "a callable rank_schedule", repr(rank_schedule), "Pass a function.")
        require(tolerance >= 0.0, "SST", "tolerance >= 0", tolerance, "Pass 0 to decompose after every round.")
        fits = isinstance(seed, Integral) and 0 <= seed < 2**63
        require(fits, "SST", "seed in 0..2^63 - 1", repr(seed), "Pass an int.")
        self._parameters: LayerParameters | None = None  # until all groups are there
        self._is_unsure = False  # whether progress was loaded, and layers have not been looked at since
        self.progress = Progress()
        self.steps_per_iteration = steps_per_iteration
        self.warmup_steps, self.warmup_shape, self.warmup_all = warmup_steps, warmup_shape, warmup_all
        self.sampling, self.project, self.decay_vectors = sampling, project, decay_vectors
        self.reset_singular_values, self.rank_schedule = reset_singular_values, rank_schedule
        self.tolerance, self.seed = tolerance, int(seed)
        model = params if isinstance(params, nn.Module) else None
        if isinstance(params, nn.Module):
            params = [p for p in params.parameters() if p.requires_grad]
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            maximize=maximize,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            unscale_in_step=unscale_in_step,
            backend=backend,
        )
        self._parameters = LayerParameters([p for group in self.param_groups for p in group["params"]], model)
        most = max(-(-len(layer.singular_values) // layer.rank) for layer in self._layers)
        self.iterations_per_round = most if iterations_per_round is None else iterations_per_round
        drawn = draws_of(self._layers)
        self.progress.draws = max(drawn)
        if len(drawn) > 1 or drawn == {0}:
            self._begin_iteration(self._next_rank())
        self._note_progress()

    @property
    def _layers(self) -> list[SSTLinear]:
        return [] if self._parameters is None else self._parameters.layers

    def _refresh(self) -> None:
        """Parameters that were replaced give their places to the new ones, and their states if the shape is the same:
        loading with assign=True keeps it, another rank does not."""
        replaced = [] if self._parameters is None else self._parameters.replaced()
        for old, new in replaced:
            state = self.state.pop(old, None)
            if state is not None and new.shape == old.shape:
                self.state[new] = state
        if replaced:
            taken = {id(old): new for old, new in replaced}
            for group in self.param_groups:
                group["params"] = [taken.get(id(p), p) for p in group["params"]]

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name in _SETTINGS}
        return super().__getstate__() | kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_parameters" in state:  # a copy, or what was pickled
            self._parameters = copy.copy(self._parameters)  # each notices by itself what is replaced

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, after checking it; layers for sparse spectral training come with the constructor."""
        params = param_group["params"]
        if not isinstance(params, (Tensor, set)):
            frozen = frozen_parameters()
            param_group["params"] = [p for p in params if id(_unnamed(p)) not in frozen]
        if self._layers:
            owners = layers_by_parameter()
            given = [params] if isinstance(params, Tensor) else param_group["params"]
            late = any(id(_unnamed(p)) in owners for p in given)
            require(not late, "SST", "SSTLinear layers when it is made", "one later", "Make a new optimizer.")
        param_group.setdefault("seed", self.seed)
        super().add_param_group(param_group)
        self._note_progress()

    def _role_of(self, p: Tensor) -> str:
        return "" if self._parameters is None else self._parameters.role_of(p)

    def _op(self, role: str) -> Op:
        return ops.step_ if role else super()._op(role)

    def _gather(self) -> Work:
        self._refresh()
        if self._is_unsure:
            self._check_draws()
        return super()._gather()

    def _note_progress(self) -> None:
        for group in self.param_groups:
            group[PROGRESS] = self.progress.as_tuple()

    def _take_up(self, progress: Progress) -> None:
        """Goes on from there; the model may be loaded later, so that its layers are looked at in the next step."""
        self.progress, self._is_unsure = progress, True
        self._note_progress()

    def _check_draws(self) -> None:
        drawn = sorted(draws_of(self._layers))
        contract = f"layers whose vectors are those of draw {self.progress.draws}, as the loaded state says"
        remedy = "Load the model's state dict that was saved with it."
        require(drawn == [self.progress.draws], "SST", contract, f"draw {', '.join(map(str, drawn))}", remedy)
        self._is_unsure = False

    def _step_groups(self, work: Work, exchange: Exchange) -> None:
        """Updates every parameter that has a gradient; then, where an iteration ends, begins the next."""
        ends = self.progress.step + 1 >= self.steps_per_iteration
        rank = self._next_rank() if ends else None
        super()._step_groups(work, exchange)
        self.progress.step += 1
        if ends:
            self.progress.step = 0
            self.progress.iteration += 1
            if self.progress.iteration >= self.iterations_per_round:
                self.progress.iteration = 0
                self.progress.round += 1
                self._end_round()
            self._begin_iteration(rank)
        self._note_progress()
        for layer in self._layers:
            layer.trust_vectors()

    def _step_bucket(
        self,
        bucket: Bucket,
        group: dict[str, Any],
        names: tuple[str, ...],
        hyper: dict[str, Any],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        if bucket.role == "vectors" or self.warmup_all:
            factor = warmup_factor(self.progress.step, self.warmup_steps, self.warmup_shape)
            group = group | {"lr": group["lr"] * factor}
        if bucket.role == "vectors" and not self.decay_vectors:
            hyper = hyper | {"weight_decay": 0.0}
        super()._step_bucket(bucket, group, names, hyper, grad_scale, found_inf)

    def _run(
        self, bucket: Bucket, group: dict[str, Any], states: dict[str, list[Tensor]], options: dict[str, Any]
    ) -> None:
        if not bucket.role:
            super()._run(bucket, group, states, options)
            return
        step = self._op(bucket.role).on(bucket.backend)
        if group["stochastic_rounding"]:
            # Counts of steps begin anew with each draw, but random numbers must not.
            options = options | {"seed": (group["seed"] + self.progress.draws) % 2**63, "ids": bucket.ids}
        step(
            bucket.params,
            bucket.grads,
            *states.values(),
            self._lr(group, bucket.device),
            project=self.project,
            **options,
        )

    def _end_round(self) -> None:
        """Decomposes again what has drifted."""
        drifted = []
        for index, layer in enumerate(self._layers):
            if not layer._is_trained():
                continue
            u, s, v = layer.factors()
            finite = all(bool(t.isfinite().all()) for t in (u, s, v))
            if not finite:
                got = f"infinities or NaNs in the layer of parameters {index}"
                raise RuntimeError(message("SST", "finite layers at the end of a round", got, "Lower lr."))
            wide = torch.promote_types(u.dtype, torch.float32)
            if drift(u.to(wide), v.to(wide)) > self.tolerance:
                drifted.append(layer)
        for layer in drifted:
            u, s, v = (t.double() for t in layer.factors())
            layer.set_factors(*decompose((u * s.unsqueeze(-1)).mT @ v))
            self._forget([layer.singular_values])

    @torch.no_grad()
    def _begin_iteration(self, rank: float | None = None) -> None:
        """Draws the vectors that are active from now on, and forgets the moments of those that were.

        Frozen layers only count the draw: vectors stored in 8 or 16 bits would be rounded again by a swap.
        """
        if rank is not None:
            self._set_rank(rank)
        moments = [[t for t in self._own_states(layer.singular_values) if t.dim() > 0] for layer in self._layers]
        uniform, backend = SAMPLINGS[self.sampling], self.param_groups[0]["backend"]
        draw_vectors(self._layers, moments, self.seed, self.progress.draws, uniform, backend)
        trained = [layer for layer in self._layers if layer._is_trained()]
        vectors = [getattr(layer, name) for layer in trained for name in VECTORS]
        values: list[Tensor] = [layer.singular_values for layer in trained]
        self._forget(vectors)
        for p in (*vectors, *values):
            p.grad = None  # of vectors that are now others, and of values that are now in another order
        if self.reset_singular_values:
            self._forget(values)
        self.progress.draws += 1
        for layer in self._layers:
            layer.draws.fill_(self.progress.draws)

    def _forget(self, params: list[Tensor]) -> None:
        """Moments and their counts become what they are at the start."""
        zeros = [t for p in params for t in self._own_states(p)]
        if zeros:
            torch._foreach_zero_(zeros)

    def _own_states(self, p: Tensor) -> list[Tensor]:
        """The parameter's moments and count, without what others keep in its state."""
        state = self.state.get(p, {})
        return [state[name] for name in (*self.rule.states, "step") if name in state]

    def _next_rank(self) -> float | None:
        """The rank of the next iteration, if there is a schedule. Raises ValueError for one that does not fit."""
        if self.rank_schedule is None:
            return None
        rank = self.rank_schedule(self.progress.draws)
        for layer in self._layers:
            rank_of("SST: rank_schedule", rank, len(layer.singular_values))
        return rank

    def _set_rank(self, rank: float) -> None:
        for layer in self._layers:
            if layer._is_trained():
                layer.set_rank(rank)
        self._refresh()

    def state_dict(self) -> dict[str, Any]:
        """States and groups as of any optimizer; groups have ``sst_progress``, where training stands."""
        self._refresh()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned. The model's state dict may be loaded before or after it, but before
        it where ranks have changed since.

        Raises:
            ValueError: a state dict of another optimizer, or of other ranks; nothing is changed. The next ``step()``
                raises it if layers have other vectors than the saved ones.
        """
        super().load_state_dict(state_dict)
