# SPDX-License-Identifier: Apache-2.0
"""examples/train_digits.py: it learns, both backends learn the same, and the table and the picture are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

for _package in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(_package, reason=f"the examples need {_package}: pip install '.[examples]'")

STEPS = 40
OPTIMIZERS = ("Adan", "LAMB")
ULP = 2 * torch.finfo(torch.float32).eps  # unit in the last place of a loss between 2 and 4, where all begin


@pytest.fixture
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("train_digits")


def nudged(cls: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The same model with every weight one unit in the last place higher."""

    class Nudged(cls):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            with torch.no_grad():
                for p in self.parameters():
                    p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)))

    return Nudged


def distance(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow("five trainings")
def test_fused_and_eager_learn_the_same(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "new" / "digits.png"
    runs = example.main(["--optimizers", *OPTIMIZERS, "--steps", str(STEPS), "--out", str(picture)])
    printed = capsys.readouterr().out

    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(runs) == list(OPTIMIZERS)
    monkeypatch.setattr(example, "VisionTransformer", nudged(example.VisionTransformer))
    for name, pair in runs.items():
        for backend, run in pair.items():
            assert len(run.losses) == len(run.milliseconds) == STEPS
            assert run.final_loss < 0.9 * run.losses[0]
            assert run.accuracy > 0.3  # chance is 0.1
            assert f"{name}, {backend}" in printed
            assert f"{run.step_time:.3f} ms" in printed
        # Rounding grows from step to step. How fast, the eager run shows by itself: against the same run from weights
        # changed in their last bit. The loss itself, a mean over a batch, is rounded too.
        moved = example.train(name, "eager", example.Digits(), STEPS, lambda run: None)
        scale = distance(moved.losses, pair["eager"].losses)
        assert distance(pair["native"].losses, pair["eager"].losses) <= 2 * scale + 4 * ULP


def test_one_backend_alone_and_a_vector_picture(example: ModuleType, tmp_path: Path) -> None:
    picture = tmp_path / "digits.svg"
    runs = example.main(["--optimizers", "Lion", "--backends", "eager", "--steps", "1", "--out", str(picture)])
    assert list(runs["Lion"]) == ["eager"]
    assert "<svg" in picture.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: expected at least 1; got 0"),
        (["--out", "digits.txt"], "--out: expected a name that ends in .png, .svg or .pdf; got digits.txt"),
    ],
)
def test_bad_arguments_are_refused_before_training(
    example: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert message in capsys.readouterr().err
