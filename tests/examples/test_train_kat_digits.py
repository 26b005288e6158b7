# SPDX-License-Identifier: Apache-2.0
"""examples/train_kat_digits.py: both models learn, the activations move, and the table and the picture are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

for _package in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(_package, reason=f"the examples need {_package}: pip install '.[examples]'")


@pytest.fixture
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("train_kat_digits")


@pytest.mark.slow("two trainings")
def test_both_models_learn(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "new" / "kat.png"
    runs = example.main(["--epochs", "2", "--seeds", "1", "--out", str(picture)])
    printed = capsys.readouterr().out

    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(runs) == ["GELU", "KAT"]
    for name, (run,) in runs.items():
        assert len(run.losses) == len(run.accuracies) == len(run.seconds) == 2
        assert run.losses[1] < 0.7 * run.losses[0]
        assert run.accuracies[1] > 0.5  # chance is 0.1
        assert f"{name}, seed 0" in printed
        assert f"{run.accuracies[1]:.1%}" in printed
    (gelu,), (kat,) = runs.values()
    coefficients = [p for name, p in kat.model.named_parameters() if name.endswith(("numerator", "denominator"))]
    assert kat.parameters - gelu.parameters == sum(p.numel() for p in coefficients)
    for layer in kat.model.layers:
        for act in (layer.mlp.act1, layer.mlp.act2):
            assert (act.numerator != torch.tensor(act.init.numerator)).all()
            assert (act.denominator != torch.tensor(act.init.denominator)).all()


def test_the_models_start_as_one_function(example: ModuleType) -> None:
    """But for the error of GELU's table, as long as inputs stay where it holds."""
    models = {}
    for name, (convert, _) in example.MODELS.items():
        torch.manual_seed(0)
        models[name] = convert(example.VisionTransformer()).eval()
    images = example.Digits().test_images
    with torch.no_grad():
        gelu, *others = (model(images) for model in models.values())
    for other in others:
        torch.testing.assert_close(other, gelu, rtol=0, atol=2e-3)
    inputs = [example.inputs_of(layer.mlp.act2, models["KAT"], images) for layer in models["KAT"].layers]
    assert all(3.0 > float(x.abs().max()) > 0.5 for x in inputs)
    assert inputs[0].shape == (images.shape[0] * 16 * 256 // example.GROUPS, example.GROUPS)


def test_coefficients_do_not_decay(example: ModuleType) -> None:
    model = example.MODELS["KAT"][0](example.VisionTransformer())
    decayed, kept = example.parameter_groups(model)
    assert kept["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith(("weight", "positions")) for p in decayed["params"])
    assert sum(names[id(p)].endswith("numerator") for p in kept["params"]) == 4
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_the_same_results_twice_and_by_every_backend(example: ModuleType, tmp_path: Path) -> None:
    digits = example.Digits()
    digits.train_images, digits.train_labels = digits.train_images[:320], digits.train_labels[:320]
    torch.set_num_threads(1)
    first, again, eager = (example.train(name, 3, digits, 1, lambda *_: None) for name in ("KAT", "KAT", "KAT-eager"))
    assert first.losses == again.losses
    assert first.accuracies == again.accuracies
    assert eager.losses == pytest.approx(first.losses, rel=1e-4)


@pytest.mark.slow("four trainings")
def test_one_model_alone_and_a_vector_picture(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Few(example.Digits):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.train_images, self.train_labels = self.train_images[:64], self.train_labels[:64]

    monkeypatch.setattr(example, "Digits", Few)
    for name in ("GELU", "KAT-eager"):
        picture = tmp_path / f"{name}.svg"
        runs = example.main(["--models", name, "--epochs", "1", "--seeds", "2", "--layer", "0", "--out", str(picture)])
        assert [run.seed for run in runs[name]] == [0, 1]
        assert "<svg" in picture.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs: expected at least 1; got 0"),
        (["--seeds", "-1"], "--seeds: expected at least 1; got -1"),
        (["--out", "kat.txt"], "--out: expected a name that ends in .png, .svg or .pdf; got kat.txt"),
    ],
)
def test_bad_arguments_are_refused_before_training(
    example: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert message in capsys.readouterr().err
