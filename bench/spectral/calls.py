# SPDX-License-Identifier: Apache-2.0
"""What is called, by us and by others, on which tensors; and whether results are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..registry import Gate
from .layers import (
    DECOMPOSE,
    LORENTZ,
    LORENTZ_BACKWARD,
    MODEL,
    RANK,
    SAMPLE,
    SCALE,
    SWAP,
    TRAIN,
    UPDATE,
    LayerShape,
)

GATE_SHAPE = LayerShape(48, 37)
GATE_MODEL = ((48, 32), (32, 80))
# Allowed error of each element relative to the element plus the mean magnitude. Tests judge the last bits.
GATE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-5}
ADAMW: dict[str, Any] = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}

Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Data:
    """Tensors by name, and lists of them."""

    tensors: dict[str, list[Tensor]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> list[Tensor]:
        return self.tensors[name]

    def copied(self, dtype: torch.dtype | None = None) -> Data:
        """Floating-point tensors as another dtype, all in memory of their own."""

        def copy(t: Tensor) -> Tensor:
            return t.to(dtype, copy=True) if dtype is not None and t.is_floating_point() else t.clone()

        return Data({name: [copy(t) for t in values] for name, values in self.tensors.items()})


def normal(device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device)


def layer_data(shape: LayerShape, dtype: torch.dtype, device: torch.device) -> Data:
    """A layer of unit vectors with the singular values of a random matrix, tokens and a gradient."""
    random, d = normal(device), shape.width
    u, v = (F.normalize(random(d, d)) for _ in range(2))
    s = torch.linspace(2.0, 0.01, d, device=device)
    tokens = [random(shape.tokens, d) for _ in range(2)]
    return Data({"factors": [u, s, v], "x": tokens[:1], "grad": tokens[1:]}).copied(dtype)


def model_data(layers: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> Data:
    """Vectors, singular values and gradients of all layers."""
    random = normal(device)
    lists: dict[str, list[Tensor]] = {"active": [], "frozen": [], "values": [], "grads": [], "value_grads": []}
    for m, n in layers:
        k, rank = min(m, n), round(RANK * min(m, n))
        for columns in (m, n):
            lists["active"].append(F.normalize(random(rank, columns)))
            lists["frozen"].append(F.normalize(random(k - rank, columns)))
            lists["grads"].append(1e-3 * random(rank, columns))
        lists["values"].append(random(k).abs())
        lists["value_grads"].append(1e-3 * random(k))
    return Data(lists).copied(dtype)


def states_of(params: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Two moments and a count for each parameter."""

    def zeros() -> list[Tensor]:
        return [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]

    return zeros(), zeros(), [torch.zeros((), device=p.device) for p in params]


def train(backend: str, data: Data) -> Call:
    """Forward, backward and update of a layer."""
    from singlepass.spectral import SST, SSTLinear

    u, s, v = data["factors"]
    options: dict[str, Any] = {"backend": backend, "dtype": u.dtype}
    layer = SSTLinear(v.shape[1], u.shape[1], RANK, False, device="meta", **options).to_empty(device=u.device)
    layer.set_factors(u, s, v)
    optimizer = SST(layer, steps_per_iteration=1 << 30, backend=backend)
    parameters = layer.singular_values, layer.active_u, layer.active_v
    return training_step(layer, parameters, optimizer.step, data)


def train_eager(data: Data) -> Call:
    """The same in plain PyTorch, factored, as the paper writes it; gradients of vectors without singular values."""
    from singlepass.reference.spectral import linear, step_
    from singlepass.spectral import SST, SSTLinear

    u, s, v = data["factors"]
    # What the optimizer draws first, so that the same vectors are trained.
    layer = SSTLinear(v.shape[1], u.shape[1], RANK, False, device="meta", dtype=u.dtype).to_empty(device=u.device)
    layer.set_factors(u, s, v)
    SST(layer)
    rank = layer.rank
    active_u, active_v, values = (
        p.detach().clone().requires_grad_() for p in (*layer.vectors()[:2], layer.singular_values)
    )
    parameters = values, active_u, active_v
    moments, squares, counts = states_of(parameters)
    lr = torch.tensor(1e-3)

    def call(x: Tensor) -> Tensor:
        active = linear(x, active_u, values[:rank], active_v)
        return active + linear(x, layer.frozen_u, values[rank:], layer.frozen_v)

    @torch.no_grad()
    def step() -> None:
        grad_s, *vectors = grads_of(parameters)
        for grad in vectors:
            grad /= values[:rank, None]
        step_(parameters, [grad_s, *vectors], moments, squares, counts, lr, **ADAMW)

    return training_step(call, parameters, step, data)


def train_full_rank(data: Data) -> Call:
    """A dense layer with AdamW."""
    from singlepass.optim import AdamW

    weight = torch.nn.Parameter(weight_of(data))
    return training_step(lambda x: F.linear(x, weight), (weight,), AdamW([weight], lr=1e-3).step, data)


def products(data: Data) -> Call:
    """The matrix products of a factored step, active and frozen vectors together, and nothing else."""
    (u, _, v), (x,), (grad,) = data["factors"], data["x"], data["grad"]
    rank = max(1, round(RANK * len(u)))

    def call() -> tuple[Tensor, ...]:
        t, q = x @ v.mT, grad @ u.mT
        return t @ u, q @ v, t[:, :rank].mT @ grad, q[:, :rank].mT @ x

    return call


def grads_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def training_step(
    layer: Callable[[Tensor], Tensor], parameters: tuple[Tensor, ...], update: Callable[[], object], data: Data
) -> Call:
    """Returns the output and all gradients."""
    x = data["x"][0].requires_grad_()

    def call() -> tuple[Tensor, ...]:
        for p in (x, *parameters):
            p.grad = None
        y = layer(x)
        y.backward(data["grad"][0])
        update()
        return (y.detach(), *grads_of((x, *parameters)))

    return call


def update(backend: str, data: Data) -> Call:
    step = implementation(UPDATE, backend)
    names = (("active", "grads"), ("values", "value_grads"))
    lists = [(data[params], data[grads], *states_of(data[params])) for params, grads in names]
    lr = torch.tensor(1e-3)

    def call() -> tuple[Tensor, ...]:
        for arguments in lists:
            step(*arguments, lr, **ADAMW)
        return (*data["active"], *data["values"])

    return call


def update_full_rank(data: Data) -> Call:
    """AdamW of all dense weights of the model."""
    from singlepass.optim import AdamW

    random, weights = normal(data["active"][0].device), []
    for u, v in zip(data["active"][::2], data["active"][1::2], strict=True):
        weights.append(torch.nn.Parameter(random(u.shape[1], v.shape[1]).to(u.dtype)))
        weights[-1].grad = (1e-3 * random(*weights[-1].shape)).to(u.dtype)
    optimizer = AdamW(weights, lr=1e-3)

    def call() -> tuple[Tensor, ...]:
        optimizer.step()
        return tuple(weights)

    return call


def scale(backend: str, data: Data) -> Call:
    run, (q,), (t,), s = implementation(SCALE, backend), data["x"], data["grad"], data["factors"][1]
    return lambda: (run(q, t, s), q)


def sample(backend: str, data: Data) -> Call:
    run, values = implementation(SAMPLE, backend), data["values"]
    ranks, ids = [len(active) for active in data["active"][::2]], list(range(len(values)))
    return lambda: tuple(run(values, ranks=ranks, ids=ids, seed=0, draw=0, uniform=0.5))


def swap(backend: str, data: Data) -> Call:
    run = implementation(SWAP, backend)
    exchange = [change for change in sample("eager", data)() for _ in "uv"]
    scales = [torch.empty(0, device=t.device) for t in exchange]

    def call() -> tuple[Tensor, ...]:
        run(data["active"], data["frozen"], scales, exchange)
        return (*data["active"], *data["frozen"])

    return call


def decompose(backend: str, data: Data) -> Call:
    """Singular values of a weight; its vectors are made beside them."""
    from singlepass.spectral._decompose import decompose as run

    weight = weight_of(data)
    return lambda: (run(weight)[1],)


def decompose_by_library(data: Data) -> Call:
    weight = weight_of(data)
    return lambda: (torch.linalg.svd(weight.float() if weight.dtype.itemsize < 4 else weight).S,)


def weight_of(data: Data) -> Tensor:
    u, s, v = data["factors"]
    return (u * s[:, None]).mT @ v


def lorentz(backend: str, data: Data) -> Call:
    run, log_scale = implementation(LORENTZ, backend), data["factors"][1][0]
    return lambda: (run(data["x"][0], log_scale, k=1.0, offset=1.1),)


def lorentz_backward(backend: str, data: Data) -> Call:
    run, log_scale = implementation(LORENTZ_BACKWARD, backend), data["factors"][1][0]
    return lambda: run(data["grad"][0], data["x"][0], log_scale, k=1.0, offset=1.1)


def implementation(op: str, backend: str) -> Callable[..., Any]:
    from singlepass._ops import OPS

    return OPS[op].on(backend)


Make = Callable[[Data], Call]
OWN: dict[str, Callable[[str, Data], Call]] = {
    TRAIN: train,
    UPDATE: update,
    SCALE: scale,
    SAMPLE: sample,
    SWAP: swap,
    DECOMPOSE: decompose,
    LORENTZ: lorentz,
    LORENTZ_BACKWARD: lorentz_backward,
}
# Whose inputs are a model's layers; the others have one layer's.
OF_MODELS = (UPDATE, SAMPLE, SWAP)


@lru_cache(maxsize=1)
def inputs(op: str, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> Data:
    return model_data(MODEL, dtype, device) if op in OF_MODELS else layer_data(shape, dtype, device)


def gate(make: Make, truth: Make, op: str, dtype: torch.dtype, device: torch.device) -> Gate:
    """One call on small inputs, compared elementwise with `truth` in float64."""
    data = model_data(GATE_MODEL, dtype, device) if op in OF_MODELS else layer_data(GATE_SHAPE, dtype, device)
    want = truth(data.copied(torch.float64))()
    got = make(data.copied())()
    errors = []
    for value, exact in zip(got, want, strict=True):
        if value.shape != exact.shape:
            return Gate(float("inf"))
        exact = exact.detach().double()
        allowed = GATE_TOLERANCE[dtype] * (exact.abs() + exact.abs().mean())
        errors.append((value.detach().double() - exact).abs() / allowed)
    return Gate.of(errors)
