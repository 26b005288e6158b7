# SPDX-License-Identifier: Apache-2.0
"""``param_groups``: what decays and what does not, in models as they are and as they are wrapped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from singlepass import spectral
from singlepass.nn import KATMLP
from singlepass.optim import AdamW, param_groups


class Model(nn.Module):
    """One of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 16)
        self.position = nn.Parameter(torch.randn(1, 4, 16))
        self.scale = nn.Parameter(torch.ones(1))
        self.norm = nn.LayerNorm(16)
        self.mlp = KATMLP(16, 32)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.head = nn.Linear(16, 9, bias=False)
        self.head.weight = self.embed.weight

    def no_weight_decay(self) -> set[str]:
        return {"position", "cls_token"}  # as in timm, where not every model has every name

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.scale * self.frozen(self.mlp(self.norm(self.embed(tokens) + self.position))))


DECAY = {"embed.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
NO_DECAY = {"position", "scale", "norm.weight", "norm.bias", "mlp.fc1.bias", "mlp.fc2.bias"}
NO_DECAY |= {f"mlp.act{i}.{name}" for i in (1, 2) for name in ("numerator", "denominator")}


def names_of(model: nn.Module, groups: list[dict[str, Any]]) -> list[list[str]]:
    names = {id(p): name.removeprefix("module.") for name, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in groups]


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_what_decays() -> None:
    model = Model()
    groups = param_groups(model, 0.1)
    decay, without = names_of(model, groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert (set(decay), set(without)) == (DECAY, NO_DECAY)
    order = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [decay, without] == [[n for n in order if n in part] for part in (DECAY, NO_DECAY)]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("how", ["DDP", "fully_shard", "compile"])
def test_wrapped_models(how: str) -> None:
    model = Model()
    if how == "DDP":
        wrapped: nn.Module = DistributedDataParallel(model)
    elif how == "fully_shard":
        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    else:
        wrapped = torch.compile(model, backend="eager")
    groups = param_groups(wrapped, 0.1)
    assert [set(names) for names in names_of(model, groups)] == [DECAY, NO_DECAY]
    optimizer = AdamW(groups, lr=1e-2)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    wrapped(torch.arange(4)[None]).square().mean().backward()
    optimizer.step()
    after = [p for p in model.parameters() if p.requires_grad]
    assert all(not torch.equal(p, q) for p, q in zip(after, before, strict=True))


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")  # of one process
@pytest.mark.usefixtures("one_process")
def test_fsdp1_is_refused() -> None:
    """Between passes its parameters are flat parts: all of them would lose their decay."""
    wrapped = FullyShardedDataParallel(nn.Sequential(nn.Linear(4, 4)), use_orig_params=True, device_id="cpu")
    with pytest.raises(ValueError, match=r"param_groups: expected parameters with their own shapes; got FullyShar"):
        param_groups(wrapped, 0.1)


def test_parts_of_zero_3() -> None:
    """DeepSpeed leaves empty parameters, and their shapes in an attribute."""
    model = nn.Linear(4, 4)
    for p in model.parameters():
        p.ds_shape, p.data = p.shape, torch.empty(0)  # type: ignore[attr-defined]
    decay, without = param_groups(model, 0.1)
    assert (decay["params"], without["params"]) == ([model.weight], [model.bias])


def test_a_shared_parameter_has_no_decay_if_one_module_asks_for_none() -> None:
    class Asking(nn.Linear):
        def no_weight_decay(self) -> set[str]:
            return {"weight"}

    model = nn.Sequential(nn.Linear(4, 4, bias=False), Asking(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert [len(group["params"]) for group in param_groups(model, 0.1)] == [0, 1]
    marked = nn.Linear(4, 4, bias=False)
    marked.weight._no_weight_decay = True  # type: ignore[assignment]
    assert [len(group["params"]) for group in param_groups(marked, 0.1)] == [0, 1]


def test_singular_values_are_a_part_of_a_weight() -> None:
    model = spectral.convert(nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20)), 3)
    groups = param_groups(model, 0.1)
    decay, without = names_of(model, groups)
    assert set(decay) == {"0.singular_values", "0.active_u", "0.active_v"}
    assert set(without) == {"0.bias", "1.weight", "1.bias"}
    optimizer = spectral.SST(groups, lr=1e-2)
    optimizer.step()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"param_groups: expected a torch\.nn\.Module; got list\. Pass the model"):
        param_groups([torch.ones(2)], 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="param_groups: expected parameters to train; got none"):
        param_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)
    with pytest.raises(ValueError, match=r"AdamW: expected weight_decay in \[0, inf\)"):
        AdamW(param_groups(nn.Linear(2, 2), -0.1))
