# SPDX-License-Identifier: Apache-2.0
"""Bases of values within a model's weights, where they cost nothing."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from ..._errors import message, require
from ._bases import MARK, MatryoshkaBases, sample_of, text_config
from ._hooks import evaluating

_OP = "fold_values"


def fold_values(model: PreTrainedModel, bases: MatryoshkaBases) -> MatryoshkaBases:
    """Multiplies the bases of values into a model's weights, in place: the projection that makes values turns them into
    coordinates of the basis, and the one after attention turns results back. The model's output is
    unchanged, and a cache has nothing left to do for values but to keep the first coordinates.

    The whole basis goes in, so that shapes stay, and every rank keeps a prefix. ``model.config`` gets a mark, by which
    caches tell folded models from others, and which is saved with the model. Models that share one config object share
    the mark: give each its own.

    Args:
        model: a decoder-only model of Transformers whose attention has ``v_proj`` and ``o_proj``, plain linear layers.
        bases: what :func:`fit_matryoshka` gave for it.

    Returns:
        MatryoshkaBases: those to use from now on. The old ones are refused for this model, and the new ones for others.

    Raises:
        ValueError: bases of another model; a model that is folded already; layers without ``v_proj`` and ``o_proj``, or
            with quantised, wrapped or shared weights; a model in which something happens to values between those two,
            such as a norm or a gate. The model is unchanged.

    Source: Lin et al., "MatryoshkaKV", arXiv 2410.14731, section 3.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from singlepass.kv import MatryoshkaCache, fit_matryoshka, fold_values
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        ...                      num_key_value_heads=2, head_dim=32, vocab_size=32)
        >>> model = LlamaForCausalLM(config)
        >>> bases = fold_values(model, fit_matryoshka(model, [torch.arange(32)[None]], progress=False))
        >>> MatryoshkaCache(model.config, bases, budget=0.5).get_seq_length()
        0
    """
    config = text_config(model)
    folded, remedy = getattr(config, MARK, None) is not None, "Fold once, and use the bases that it returned."
    require(not folded, _OP, "a model whose values are not folded yet", "a folded one", remedy)
    bases.check_model(_OP, model)
    clipped = getattr(config, "clip_qkv", None) is not None
    require(not clipped, _OP, "values that are not clipped", "clip_qkv in the config", "Use the bases without folding.")
    layers = _attention_layers(model, bases)
    whole = {layer: u.detach().double().cpu() for layer, u in bases.values.items()}
    mark = hashlib.sha256(b"".join(u.numpy().tobytes() for u in whole.values())).hexdigest()[:16]
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(config.vocab_size, (1, 128), generator=generator, device="cpu")
    probe = probe.to(next(model.parameters()).device)
    was = [(w, w.detach().clone()) for layer in layers.values() for w in _weights(*layer)]
    try:
        with torch.no_grad(), evaluating(model):
            before, outputs = _results(model, layers, probe)
            for number, (values, output) in layers.items():
                _multiply(whole[number], values, output)
            after, _ = _results(model, layers, probe, outputs)
            for number, u in whole.items():
                off = _difference(before[number], after[number], u)
                allowed = max(
                    4 * torch.finfo(layers[number][0].weight.dtype).eps, 1e-5
                )  # weights are rounded once more
                contract = f"nothing between v_proj and o_proj of layer {number} but attention"
                remedy = "Use the bases without folding."
                require(off <= allowed, _OP, contract, f"results that change by {off:.2g}", remedy)
    except BaseException:
        with torch.no_grad():
            for weight, its in was:
                weight.copy_(its)
        raise
    setattr(config, MARK, mark)
    values_now = {layer: torch.eye(u.shape[1], device="cpu").expand(u.shape).contiguous() for layer, u in whole.items()}
    return replace(bases, values=values_now, sample=sample_of(model), folded=mark)


def _results(
    model: PreTrainedModel,
    layers: dict[int, tuple[nn.Linear, nn.Linear]],
    ids: Tensor,
    outputs: dict[int, Tensor] | None = None,
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """What each layer's attention gives to its output projection, and what that makes of it. Given ``outputs`` take the
    place of the latter, so that a difference in one layer makes none in others."""
    found: tuple[dict[int, Tensor], dict[int, Tensor]] = {}, {}

    def note(number: int, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        found[0][number], found[1][number] = inputs[0].double().cpu(), output
        return output if outputs is None else outputs[number]

    hooks = [output.register_forward_hook(partial(note, number)) for number, (_, output) in layers.items()]
    try:
        model.base_model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _difference(before: Tensor, after: Tensor, u: Tensor) -> float:
    """By how much results (..., query heads * channels) are not those from before, turned by the bases."""
    heads, channels, _ = u.shape
    want = before.unflatten(-1, (heads, -1, channels)) @ u
    return float((after - want.flatten(-3)).norm() / want.norm())


def _attention_layers(model: PreTrainedModel, bases: MatryoshkaBases) -> dict[int, tuple[nn.Linear, nn.Linear]]:
    """The projections that make values and that use results, by number of the layer."""
    found: dict[int, tuple[nn.Linear, nn.Linear]] = {}
    modules = [m for parent in model.modules() for m in parent._modules.values() if m is not None]  # shared ones twice
    uses = Counter(p.data_ptr() for m in modules for p in m._parameters.values() if p is not None)
    for module in model.modules():
        number: Any = getattr(module, "layer_idx", None)
        if number not in bases.values or not hasattr(module, "v_proj"):
            continue
        values, output = (_linear(module, name, number, uses) for name in ("v_proj", "o_proj"))
        heads, channels, _ = bases.values[number].shape
        fits = values.out_features == heads * channels and output.in_features % (heads * channels) == 0
        contract = f"{heads} KV heads of {channels} channels in layer {number}"
        require(fits, _OP, contract, f"{values.out_features} values", "Use the bases without folding.")
        found[number] = values, output
    missing = sorted(set(bases.values) - set(found))
    require(
        not missing, _OP, "v_proj and o_proj in every layer", f"none in {missing}", "Use the bases without folding."
    )
    return found


def _linear(module: nn.Module, name: str, number: int, uses: Counter[int]) -> nn.Linear:
    """A projection with weights of its own, if it is one."""
    its = getattr(module, name, None)
    if type(its) is not nn.Linear or not its.weight.is_floating_point():
        contract, remedy = (
            f"{name} of layer {number} as a plain nn.Linear",
            "Merge adapters first; quantise after folding.",
        )
        raise ValueError(message(_OP, contract, type(its).__name__, remedy))
    shared = any(uses[w.data_ptr()] > 1 for w in its.parameters())
    require(not shared, _OP, f"weights of its own in {name} of layer {number}", "shared ones", "Untie them.")
    return its


def _weights(values: nn.Linear, output: nn.Linear) -> list[Tensor]:
    return [w for w in (values.weight, values.bias, output.weight) if w is not None]


def _multiply(u: Tensor, values: nn.Linear, output: nn.Linear) -> None:
    """Makes values v U of values v, and takes such for results."""
    u = u.to(values.weight.device).double()
    heads, channels = u.shape[:2]
    rows = values.weight.double().unflatten(0, (heads, channels))
    values.weight.copy_((u.mT @ rows).flatten(0, 1))
    if values.bias is not None:
        values.bias.copy_((u.mT @ values.bias.double().view(heads, channels, 1)).flatten())
    columns = output.weight.double().unflatten(1, (heads, -1, channels))  # (outputs, heads, query heads, channels)
    output.weight.copy_((columns @ u[None]).flatten(1))
