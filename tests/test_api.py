# SPDX-License-Identifier: Apache-2.0
"""What users see: by kind in optim, nn and functional, by family in kv and spectral; arguments are spelled out."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import pytest
import torch

import singlepass
from singlepass import functional, kv, nn, optim, rational, spectral

FACES = {module.__name__.rpartition(".")[2]: module for module in (functional, kv, nn, optim, spectral)}
FAMILIES = (kv, optim, rational, spectral)


def names(module: ModuleType) -> list[str]:
    return dir(module)


PUBLIC = [(face, name) for face, module in FACES.items() for name in names(module)]


def test_completion_shows_the_public_names() -> None:
    assert dir(singlepass) == sorted(["__version__", *FACES])
    for module in (*FACES.values(), rational):
        assert set(module.__all__) <= set(dir(module))
    assert "SST" in dir(optim)
    assert ("ZipCache" in dir(kv)) == (importlib.util.find_spec("transformers") is not None)


def test_faces_only_show_what_families_have() -> None:
    for face in (functional, nn):
        for name in face.__all__:
            assert getattr(face, name).__module__.split(".")[1] in {
                family.__name__.split(".")[1] for family in FAMILIES
            }
    assert optim.SST is spectral.SST


def test_modules_and_functions_are_found_by_kind() -> None:
    for family in FAMILIES:
        for name in family.__all__:
            value = getattr(family, name)
            if inspect.isclass(value) and issubclass(value, torch.nn.Module):
                assert getattr(nn, name) is value
            elif inspect.isclass(value) and issubclass(value, torch.optim.Optimizer):
                assert getattr(optim, name) is value


def test_inner_modules_have_an_underscore() -> None:
    package = Path(singlepass.__file__).parent
    public = {"functional.py", "nn.py"}
    for path in package.rglob("*.py"):
        inside = path.relative_to(package).parts
        if inside[0] not in ("reference", "_ops"):  # whose parts are called as the families are
            assert inside[-1].startswith("_") or inside[-1] in public, path


@pytest.mark.parametrize(("face", "name"), PUBLIC)
def test_arguments_are_spelled_out(face: str, name: str) -> None:
    value = getattr(FACES[face], name)
    if not callable(value) or (inspect.isclass(value) and not hasattr(value.__init__, "__code__")):
        return
    kinds = {p.kind for p in inspect.signature(value).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert inspect.Parameter.VAR_POSITIONAL not in kinds


def test_what_is_not_there_is_an_attribute_error() -> None:
    for module in FACES.values():
        with pytest.raises(AttributeError):
            module.nothing_of_the_kind  # noqa: B018
