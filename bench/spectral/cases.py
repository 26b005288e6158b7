# SPDX-License-Identifier: Apache-2.0
"""Sparse spectral training: a layer's whole training step beside full rank, and each op by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..probe import Probe
from ..registry import Case, Gate, Pass, Provider, Step, Tier, fitting
from .layers import (
    DECOMPOSE,
    LORENTZ,
    LORENTZ_BACKWARD,
    MODEL,
    MODEL_NAME,
    RANK,
    SAMPLE,
    SCALE,
    SHAPES,
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
FLOPS_UPDATE = 17  # of an element: AdamW's, and a row's norm and division

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
    worst = 0.0
    for value, exact in zip(got, want, strict=True):
        if value.shape != exact.shape:
            return Gate(float("inf"))
        exact = exact.detach().double()
        error = (value.detach().double() - exact).abs() / (GATE_TOLERANCE[dtype] * (exact.abs() + exact.abs().mean()))
        worst = max(worst, error.nan_to_num(nan=float("inf")).max().item())
    return Gate(worst)


def own_reason(ops: tuple[str, ...], backend: str, dtype: torch.dtype, device: torch.device) -> str | None:
    from singlepass._ops import OPS

    return next((why for op in ops if (why := OPS[op].rejection(backend, device.type, (dtype,)))), None)


def providers(op: str, ops: tuple[str, ...], dtype: torch.dtype, held: int) -> Iterator[Provider]:
    """`held`: bytes of the inputs, which every provider copies."""
    eager: Make = train_eager if op == TRAIN else partial(OWN[op], "eager")

    def provider(name: str, column: str, tier: Tier, make: Make, truth: Make = eager, **options: Any) -> Provider:
        return Provider(
            name,
            column,
            tier,
            prepare=lambda data: Step(make(data.copied())),
            gate=partial(gate, make, truth, op, dtype),
            footprint=3 * held,
            **options,
        )

    if op == DECOMPOSE:
        # Made of the library's own parts: one provider, on every device.
        yield provider("native", "native", Tier.FUSED, partial(decompose, "native"), truth=decompose_by_library)
        yield provider("eager", "eager", Tier.EAGER, decompose_by_library, truth=decompose_by_library)
        return
    for name in ("native", "triton"):
        why_not = partial(own_reason, ops, name, dtype)
        yield provider(name, name, Tier.FUSED, partial(OWN[op], name), why_not=why_not)
    if op in (TRAIN, UPDATE):
        dense = train_full_rank if op == TRAIN else update_full_rank
        yield provider("full-rank", "yardstick", Tier.FUSED, dense, truth=dense, differs="all of W is trained")
    if op == TRAIN:
        differs = "what the products take of a training step"
        yield provider("products", "peer", Tier.FUSED, products, truth=products, differs=differs)
    # Steps that matrix products fill differ by little more than those drift: timed in turn, the eager one too.
    yield provider("eager", "eager", Tier.FUSED if op == TRAIN else Tier.EAGER, eager)


def passes(op: str, shape: LayerShape, dtype: torch.dtype) -> tuple[Pass, ...]:
    """Matrix products have no floor here: of a training step, the weights, gradients and states are counted once."""
    size = dtype.itemsize
    tokens = shape.tokens * shape.width * size
    if op == TRAIN:
        vectors, active = 2 * shape.width**2, 2 * shape.rank * shape.width
        return (Pass((vectors * size, 2 * tokens), (active * size, 2 * active * 4)),)
    if op in OF_MODELS:
        active = sum(round(RANK * min(m, n)) * (m + n) for m, n in MODEL)
        values = sum(min(m, n) for m, n in MODEL)
        if op == UPDATE:
            count = active + values
            return (Pass((count * size,), (count * size, count * 4, count * 4)),)
        return (Pass((values * size,), ()),) if op == SAMPLE else (Pass((), (active * size, active * size)),)
    if op == DECOMPOSE:
        return (Pass((3 * shape.width**2 * size,), ()),)
    return (Pass((), (tokens,)),) if op == LORENTZ else (Pass((tokens,), (tokens,)),)


def flops(op: str, shape: LayerShape) -> int:
    elements = shape.tokens * shape.width
    if op == TRAIN:
        from singlepass.spectral._product import Sizes, evaluation_of
        from singlepass.spectral._product import flops as counted

        sizes = Sizes(shape.tokens, shape.width, shape.width, shape.width, shape.rank)
        return counted(sizes, True)[evaluation_of(sizes, True)]
    if op in OF_MODELS:
        active = sum(round(RANK * min(m, n)) * (m + n) for m, n in MODEL)
        return active * FLOPS_UPDATE if op == UPDATE else 0
    # A decomposition takes some ten products of matrices, by whatever algorithm.
    per_element = {SCALE: 3, LORENTZ: 3, LORENTZ_BACKWARD: 7, DECOMPOSE: 20 * shape.width**2 / shape.tokens}
    return round(per_element[op] * elements)


def cases(device: torch.device) -> Iterator[Case]:
    """Training steps and the update, which have bars; then the other ops."""
    shapes = SHAPES["cuda" if device.type == "cuda" else "cpu"]
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    for dtype in dtypes:
        for shape in shapes:
            yield case(TRAIN, shape, dtype)
        for op in OWN:
            if op != TRAIN:
                yield case(op, shapes[0], dtype)


QUICK_SHAPES = (SHAPES["cpu"][0], LayerShape(1024, 512), LayerShape(512, 512))
QUICK_SECONDS = 0.5  # that a training step may take


def quick_cases(device: torch.device, probe: Probe) -> Iterator[Case]:
    if device.type == "cuda":
        yield from cases(device)
        return
    shape = fitting(QUICK_SHAPES, lambda shape: 1.5 * probe.computing(flops(TRAIN, shape)), QUICK_SECONDS)
    for op in (TRAIN, UPDATE, LORENTZ):
        yield case(op, shape, torch.float32)


def case(op: str, shape: LayerShape, dtype: torch.dtype) -> Case:
    of_model = op in OF_MODELS
    ops = (SCALE, UPDATE, SAMPLE, SWAP) if op == TRAIN else () if op == DECOMPOSE else (op,)
    elements = sum(m * n for m, n in MODEL) if of_model else shape.width**2
    held = (elements if of_model else 2 * elements + 2 * shape.tokens * shape.width) * 4
    return Case(
        family="spectral",
        op=op,
        size=MODEL_NAME if of_model else shape.name,
        dtype=dtype,
        ops=ops,
        passes=passes(op, shape, dtype),
        flops=flops(op, shape),
        elements=elements,
        input_bytes=elements * dtype.itemsize,
        tensors=len(MODEL) if of_model else 1,
        inputs=partial(inputs, op, shape, dtype),
        providers=tuple(providers(op, ops, dtype, held)),
    )
