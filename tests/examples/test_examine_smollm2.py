# SPDX-License-Identifier: Apache-2.0
"""examples/examine_smollm2.py: it runs, on a tiny model in place of the real one, and docs/kv.md says what its result
file does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

for _package in ("matplotlib", "rich", "transformers"):
    pytest.importorskip(_package, reason=f"the example needs {_package}: pip install '.[examples,kv]'")


@pytest.fixture
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("examine_smollm2")


def tiny() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 256, "head_dim": 64}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)).eval()


def encode(text: str) -> list[int]:
    return list(text.encode())


def small(example: ModuleType) -> Any:
    some = {"texts": ((150, 2),), "questions": ((250, 2),), "follow": 16}
    return example.Exam(steps=2, batch=64, fitted=2, searched=32, per_round=20, **some)


@pytest.mark.slow("fits, trains and searches, and examines every cache")
def test_a_quick_run(example: ModuleType, tmp_path: Path) -> None:
    import _smollm2_report as report

    exam = small(example)
    result = example.run(tiny(), encode, exam, tmp_path / "bases")
    rows = report.rows_of(result)
    for row in rows:
        assert len(row.losses) == len(row.found) == 2
        assert all(math.isfinite(x) for x in row.losses)
    by_name = {row.name: row for row in rows}
    plain = by_name[example.PLAIN]
    assert plain.bytes == 2 * 2 * 64
    assert by_name[f"{report.PC}, 50 %"].bytes == by_name[f"{report.SEARCHED}, 50 %"].bytes == plain.bytes / 2
    assert by_name["8 bits, per token and head"].losses == pytest.approx(plain.losses, abs=1e-3)
    assert set(report.STYLES) <= {row.family for row in rows}
    example.save(result, tmp_path / "result.json")
    example.draw(result, tmp_path / "result.svg")
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    assert "<svg" in (tmp_path / "result.svg").read_text(encoding="utf-8")
    assert len(report.verdicts(rows)) == 4
    # What was fitted is not fitted again, and gives the same.
    again = example.run(tiny(), encode, exam, tmp_path / "bases")
    assert [row.losses for row in report.rows_of(again)] == [row.losses for row in rows]


def test_prompts(example: ModuleType) -> None:
    """As long as they should be; each question's answer is in its text, and is what is asked for."""
    held_out = torch.tensor(encode("word " * 400))
    found = list(example.prompts(encode, held_out, small(example)))
    assert [prompt.ids.shape[1] for prompt in found] == [150, 150, 250, 250]
    for prompt in found[2:]:
        whole, answer = bytes(prompt.ids[0].tolist()).decode(), bytes(prompt.follow[0].tolist()).decode()
        assert whole.endswith("?\nAnswer:")
        assert f"\n\nThe{answer.removeprefix(' The')}.\n\n" in whole
        assert answer[-prompt.asked :].isdigit()
        assert prompt.asked == 5


def test_caches_are_filled_as_a_model_would(example: ModuleType) -> None:
    """What a prompt read once gives to a cache is what the model gives to it."""
    from singlepass.kv import ZipCache

    model, ids = tiny(), torch.tensor([encode("some text, and some more of it, to be read at once " * 4)])
    scheme = example.Scheme("", "zipcache", lambda config: ZipCache(config, 1.0, salient_bits=8))
    prompt = example.Prompt(ids[:, :-10], ids[:, -10:])
    got, nbytes = example.go_on(model, scheme, example.read(model, prompt.ids), prompt)
    cache = scheme.make(model.config)
    with torch.no_grad():
        model(prompt.ids, cache=cache)
        assert cache.nbytes == nbytes
        want = model(prompt.follow, cache=cache).logits
    torch.testing.assert_close(got, want, rtol=0.0, atol=1e-5)


def test_the_page_says_what_the_result_file_does(example: ModuleType) -> None:
    import _smollm2_report as report

    result = json.loads(example.KEPT.read_text(encoding="utf-8"))
    page = example.DOCUMENT.read_text(encoding="utf-8")
    assert example.markdown(result) in page
    assert example.PICTURE.exists()
    rows = {row.name: row for row in report.rows_of(result)}
    chosen = (
        "8 bits, per token and head",
        "ZipCache's codec, all in 4 bits",
        "ZipCache, 60 %",
        "ZipCache's codec, all in 2 bits",
    )
    for name in chosen:  # what the page recommends
        assert f"| {rows[example.PLAIN].bytes / rows[name].bytes:.1f} |" in page
