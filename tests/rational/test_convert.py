# SPDX-License-Identifier: Apache-2.0
"""Vision transformers turned into Kolmogorov-Arnold transformers compute what they did."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from singlepass.nn import KATMLP, GroupRational, fit_rational, kat_from_vit, no_weight_decay, table
from singlepass.rational._convert import _SAME
from singlepass.rational._tables import TARGETS


class Mlp(nn.Module):
    """timm's, by its attributes and its forward pass."""

    def __init__(self, width: int, hidden: int, act: Callable[[], Any] = nn.GELU, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = act()
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, width)
        self.drop2 = nn.Dropout(drop / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class QuickGELU(nn.Module):
    """transformers' QuickGELUActivation, which CLIP has."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Named(nn.Module):
    """An MLP whose parts have other names, as DINOv3's."""

    def __init__(self, first: str, act: str, second: str) -> None:
        super().__init__()
        self.names = first, act, second
        for name, part in zip(self.names, (nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)), strict=True):
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self, name)(x)
        return x


def torchvision_mlp(drop: float = 0.0) -> nn.Sequential:
    """torchvision.ops.MLP, as its vision transformers have it."""
    parts = nn.Linear(16, 64), nn.GELU(), nn.Dropout(drop), nn.Linear(64, 16), nn.Dropout(drop / 2)
    return nn.Sequential(*parts)


class Intermediate(nn.Module):
    """transformers' ViTIntermediate."""

    def __init__(self, width: int, hidden: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.dense = nn.Linear(width, hidden)
        self.intermediate_act_fn = act

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(hidden_states))


class Block(nn.Module):
    def __init__(self, mlp: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Reach:
    """The largest value that enters the activations of a model's fc1 or dense."""

    def __init__(self, model: nn.Module) -> None:
        self.value = 0.0
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.endswith(("fc1", "dense")):
                module.register_forward_hook(self.see)

    def see(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.value = max(self.value, float(out.detach().abs().max()))


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.GELU, "gelu"),
        (partial(nn.GELU, approximate="tanh"), "gelu"),
        (nn.SiLU, "silu"),
        (partial(nn.ReLU, inplace=True), "relu"),
        (nn.Mish, "mish"),
        (lambda: F.gelu, "gelu"),
        (QuickGELU, "quick_gelu"),
    ],
)
@pytest.mark.parametrize("form", "AB")
def test_outputs_stay_within_the_tables_error(act: Callable[[], Any], name: str, form: str) -> None:
    """One block: an error e of the activation becomes at most e times the absolute row sums of fc2."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(Mlp(16, 64, act))).eval()
    x = torch.randn(4, 9, 16)
    before, fc1, fc2 = model(x), model[0].mlp.fc1, model[0].mlp.fc2
    assert fc1(model[0].norm(x)).abs().max() < 3.0
    tensors = {id(p) for p in model.parameters()}
    assert kat_from_vit(model, form=form) is model
    mlp = model[0].mlp
    assert isinstance(mlp, KATMLP)
    assert mlp.fc1 is fc1
    assert mlp.fc2 is fc2
    assert tensors <= {id(p) for p in model.parameters()}
    assert mlp.act2.init == table(name, form)
    approximation = 5e-4 if act is not nn.GELU and name == "gelu" else 0.0  # of GELU by tanh
    bound = (table(name, form).max_error + approximation) * fc2.weight.abs().sum(1).max() + 1e-5
    error = (model(x) - before).abs().max()
    assert error < bound
    assert error > 0.0


def test_intermediates() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"intermediate": Intermediate(16, 32, nn.SiLU()), "output": nn.Linear(32, 16)})
    model["other"] = Intermediate(16, 32, F.relu)
    x = torch.randn(50, 16).clamp(-1.0, 1.0)
    assert all(model[name].dense(x).abs().max() < 3.0 for name in ("intermediate", "other"))
    before = [model[name](x) for name in ("intermediate", "other")]
    keys = set(model.state_dict())
    kat_from_vit(model, groups=4)
    for name, old, target in zip(("intermediate", "other"), before, ("silu", "relu"), strict=True):
        assert (model[name](x) - old).abs().max() < table(target).max_error + 1e-5
    assert keys < set(model.state_dict())
    assert no_weight_decay(model) == set(model.state_dict()) - keys
    assert model["intermediate"].act2.groups == 4


def test_a_converted_model_trains_and_loads() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(Mlp(16, 32)), Block(Mlp(16, 32)))
    twin = kat_from_vit(copy.deepcopy(model))
    kat_from_vit(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    model(torch.randn(3, 16)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(5, 16)
    assert torch.equal(model(x), twin(x))


def test_options_reach_the_activations() -> None:
    wide = fit_rational(F.gelu, "B", (3, 2), (-6.0, 6.0))
    model = nn.Sequential(Mlp(16, 32, drop=0.2)).eval().to(torch.float64)
    kat_from_vit(model, groups=2, init=wide, form="B", degrees=(3, 2), backend="eager")
    mlp = model[0]
    for act, drop in ((mlp.act1, 0.1), (mlp.act2, 0.2)):
        assert (act.groups, act.form, act.degrees, act.backend, act.dropout) == (2, "B", (3, 2), "eager", drop)
        assert not act.training
        assert act.numerator.dtype == torch.float32
    assert mlp.act2.init is wide
    assert not mlp.training


def test_an_mlp_in_several_places_stays_one() -> None:
    shared = Mlp(16, 32)
    model = nn.ModuleDict({"a": Block(shared), "b": Block(shared), "c": Block(Mlp(16, 32))})
    kat_from_vit(model)
    assert isinstance(model["a"].mlp, KATMLP)
    assert model["a"].mlp is model["b"].mlp
    assert model["a"].mlp is not model["c"].mlp


class Gated(Mlp):
    """timm's GluMlp: as Mlp, but half of fc1 gates the other half."""

    def __init__(self) -> None:
        super().__init__(16, 64)
        self.fc2 = nn.Linear(32, 16)


def normed() -> Mlp:
    mlp = Mlp(16, 32)
    mlp.norm = nn.LayerNorm(32)  # type: ignore[assignment]
    return mlp


@pytest.mark.parametrize(
    ("model", "remedy"),
    [
        (nn.Linear(4, 4), "Put"),
        (nn.Sequential(Gated()), "Put"),
        (nn.Sequential(normed()), "Put"),
        (nn.Sequential(KATMLP(16, 32)), "It has been converted already"),
    ],
)
def test_models_without_such_mlps(model: nn.Module, remedy: str) -> None:
    children = [*model.modules()]
    got = type(model).__name__
    with pytest.raises(ValueError, match=rf"^kat_from_vit: expected a model with MLPs .*; got {got}\. {remedy}"):
        kat_from_vit(model)
    assert [*model.modules()] == children


@pytest.mark.parametrize("act", [nn.PReLU, nn.ReLU6, partial(nn.GLU, dim=0)])
def test_unknown_activations_change_nothing(act: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(Block(Mlp(16, 32)), Block(Mlp(16, 32, act)))
    modules = [*model.modules()]
    with pytest.raises(ValueError, match=r"expected an activation among geglu.*; got .* at 1\.mlp\. Fit a table"):
        kat_from_vit(model)
    assert [*model.modules()] == modules
    kat_from_vit(model, init="gelu")
    assert isinstance(model[1].mlp, KATMLP)


def test_widths_that_groups_do_not_divide_change_nothing() -> None:
    model = nn.Sequential(Block(Mlp(16, 32)), Block(Mlp(16, 36)))
    modules = [*model.modules()]
    with pytest.raises(ValueError, match="a number of groups that divides 36 channels; got 8"):
        kat_from_vit(model)
    assert [*model.modules()] == modules


def test_targets_cannot_be_mistaken() -> None:
    x = torch.linspace(-8.0, 8.0, 161)
    for f, g in itertools.combinations(TARGETS.values(), 2):
        assert (f(x) - g(x)).abs().max() > 20 * _SAME


class Tabled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return table("gelu")(x)


def tabled(model: nn.Module) -> nn.Module:
    """A copy whose GELUs are the table's: what conversion is to compute, without the table's own error."""
    model = copy.deepcopy(model)
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if "GELU" in type(child).__name__:
                setattr(module, name, Tabled())
    return model


def activations(model: nn.Module) -> list[GroupRational]:
    return [module for module in model.modules() if isinstance(module, GroupRational)]


def test_timm() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5
    ).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = tabled(model)(x)
    kat_from_vit(model)
    reach = Reach(model)
    assert len(activations(model)) == 4
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)
    assert 0.0 < reach.value < 8.0
    built = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, mlp_layer=KATMLP
    )
    built.load_state_dict(model.state_dict())
    torch.testing.assert_close(built.eval()(x), model(x))


def test_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        initializer_range=0.1,
    )
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = tabled(model)(x).last_hidden_state
    kat_from_vit(model)
    reach = Reach(model)
    assert len(activations(model)) == 4
    torch.testing.assert_close(model(x).last_hidden_state, expected, atol=1e-5, rtol=0)
    assert 0.0 < reach.value < 8.0


@pytest.mark.parametrize(
    "mlp",
    [torchvision_mlp(), Named("up_proj", "act_fn", "down_proj"), Named("c_fc", "act", "c_proj")],
    ids=["torchvision", "DINOv3", "c_fc"],
)
def test_mlps_of_other_libraries(mlp: nn.Module) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(mlp)).eval(), torch.randn(4, 9, 16)
    before = model(x)
    linears = [m for m in mlp.modules() if isinstance(m, nn.Linear)]
    kat_from_vit(model)
    assert isinstance(model[0].mlp, KATMLP)
    assert [model[0].mlp.fc1, model[0].mlp.fc2] == linears
    bound = table("gelu").max_error * linears[1].weight.abs().sum(1).max() + 1e-5
    assert 0.0 < (model(x) - before).abs().max() < bound


def test_dropouts_in_a_row_move_to_where_kat_has_them() -> None:
    mlp = kat_from_vit(nn.Sequential(torchvision_mlp(0.4)))[0]
    assert (mlp.act1.dropout, mlp.act2.dropout) == (0.2, 0.4)


@pytest.mark.parametrize(
    "row",
    [
        nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.Linear(64, 16)),
        nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 10)),
        nn.Sequential(nn.Linear(16, 64), nn.Softmax(-1), nn.Linear(64, 16)),
    ],
    ids=["norm", "head", "softmax"],
)
def test_other_rows_of_layers_stay(row: nn.Sequential) -> None:
    """Beside an MLP that is one: they are no reason to refuse the model."""
    model = kat_from_vit(nn.Sequential(Block(Mlp(16, 32)), row))
    assert model[1] is row
    assert [type(m) for m in row] == [type(m) for m in row.children()]


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 16, "initializer_range": 0.1}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def test_gpt2() -> None:
    """Its Conv1D layers become torch.nn.Linear, whose weights are theirs, transposed."""
    model, tokens = gpt2(), torch.arange(24).view(2, 12)
    weights = [block.mlp.c_fc.weight.detach().clone() for block in model.transformer.h]
    expected = tabled(copy.deepcopy(model))(tokens).logits
    kat_from_vit(model)
    for block, weight in zip(model.transformer.h, weights, strict=True):
        assert torch.equal(block.mlp.fc1.weight, weight.mT)
        assert block.mlp.fc1.weight.is_contiguous()
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-4, rtol=0)
    model(tokens).logits.sum().backward()
    assert all(p.grad is not None for p in model.transformer.h.parameters())


@pytest.mark.parametrize("where", ["hook", "pre-hook", "backward hook", "patched forward"])
def test_calls_that_somebody_changed_are_refused(where: str) -> None:
    model = nn.Sequential(Block(Mlp(16, 32)), Block(Mlp(16, 32)))
    mlp = model[1].mlp
    if where == "patched forward":
        mlp.forward = partial(Mlp.forward, mlp)
    else:
        name = {"hook": "forward_hook", "pre-hook": "forward_pre_hook", "backward hook": "full_backward_hook"}[where]
        getattr(mlp, f"register_{name}")(lambda *args: None)
    modules = [*model.modules()]
    with pytest.raises(ValueError, match=r"kat_from_vit: expected layers without hooks to replace.* at 1\.mlp\. Conv"):
        kat_from_vit(model)
    assert [*model.modules()] == modules
