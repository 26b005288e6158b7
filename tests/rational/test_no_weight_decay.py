# SPDX-License-Identifier: Apache-2.0
"""Coefficients are found by what modules are, whatever has been done to their parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, distribute_module
from torch.nn.utils import parametrize, prune

from singlepass.nn import GRKAN, KATMLP, GroupRational, no_weight_decay

COEFFICIENTS = {"act1.numerator", "act1.denominator", "act2.numerator", "act2.denominator"}


@pytest.fixture
def one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(model: nn.Module) -> nn.Module:
    model(torch.randn(3, 16)).square().mean().backward()
    return model


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x


def replaced(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.detach().clone()))
    return model


def emptied(model: nn.Module) -> nn.Module:
    with torch.device("meta"):
        return copy.deepcopy(model).to("meta").to_empty(device="cpu")


def assigned(model: nn.Module) -> nn.Module:
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    return model


@pytest.mark.parametrize("change", [replaced, emptied, assigned, copy.deepcopy], ids=lambda f: f.__name__)
def test_parameters_that_were_replaced(change: Callable[[nn.Module], nn.Module]) -> None:
    assert no_weight_decay(change(KATMLP(16, 32))) == COEFFICIENTS


def test_compiled_modules() -> None:
    model = KATMLP(16, 32)
    assert no_weight_decay(torch.compile(model, backend="eager")) == {f"_orig_mod.{name}" for name in COEFFICIENTS}
    model.act1 = torch.compile(model.act1, backend="eager")
    expected = {name.replace("act1.", "act1._orig_mod.") for name in COEFFICIENTS}
    assert no_weight_decay(model) == expected
    assert expected < {name for name, _ in model.named_parameters()}


def test_parametrised_and_pruned_coefficients() -> None:
    model = KATMLP(16, 32)
    parametrize.register_parametrization(model.act1, "numerator", Twice())
    prune.l1_unstructured(model.act2, "denominator", 2)
    others = COEFFICIENTS - {"act1.numerator", "act2.denominator"}
    assert no_weight_decay(model) == others | {"act1.parametrizations.numerator.original", "act2.denominator_orig"}


def test_tied_coefficients_have_the_name_under_which_the_model_lists_them() -> None:
    model = nn.ModuleList([nn.Linear(16, 16), GroupRational(16), GroupRational(16)])
    model[2].numerator = model[1].numerator = nn.Parameter(model[1].numerator.detach().clone())
    assert no_weight_decay(model) == {"1.numerator", "1.denominator", "2.denominator"}
    model[0].extra = model[1].numerator
    assert no_weight_decay(model) == {"0.extra", "1.denominator", "2.denominator"}


def test_marks_of_other_modules_count() -> None:
    model = nn.Sequential(nn.Linear(16, 16), GRKAN(16, 16))
    model[0].bias._no_weight_decay = True
    assert no_weight_decay(model) == {"0.bias", "1.act.numerator", "1.act.denominator"}


def test_fully_sharded_models(one_process: None) -> None:
    model = KATMLP(16, 32)
    fully_shard(model.act1)
    fully_shard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert no_weight_decay(model) == COEFFICIENTS
    assert no_weight_decay(trained(model)) == COEFFICIENTS


def test_models_sharded_before_they_have_memory(one_process: None) -> None:
    model = KATMLP(16, 32, device="meta")
    fully_shard(model)
    model.to_empty(device="cpu")
    assert no_weight_decay(model) == COEFFICIENTS


def test_distributed_modules(one_process: None) -> None:
    model = distribute_module(KATMLP(16, 32), init_device_mesh("cpu", (1,)))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert no_weight_decay(model) == COEFFICIENTS


def test_data_parallel_models(one_process: None) -> None:
    model = nn.parallel.DistributedDataParallel(KATMLP(16, 32))
    assert no_weight_decay(trained(model)) == {f"module.{name}" for name in COEFFICIENTS}


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_flattened_models(one_process: None) -> None:
    options = {"device_id": torch.device("cpu")}
    model = FullyShardedDataParallel(KATMLP(16, 32), use_orig_params=True, **options)
    assert no_weight_decay(trained(model)) == {f"_fsdp_wrapped_module.{name}" for name in COEFFICIENTS}
    model = FullyShardedDataParallel(KATMLP(16, 32), use_orig_params=False, **options)
    with pytest.raises(ValueError, match=r"parameters of their own; got none in '_fsdp_wrapped_module\.act1'"):
        no_weight_decay(model)
