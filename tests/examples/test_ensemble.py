"""The example of an ensemble runs, and its figures are what their names say."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.zoo import Zoo

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ensemble() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ensemble", ROOT / "examples" / "ensemble.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ensemble"] = module  # where its dataclasses look for their own names
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def task(tmp_path: Path) -> Path:
    (tmp_path / "parity").mkdir()
    items = [{"text": str(n), "answer": ("even", "odd")[n % 2]} for n in range(12)]
    lines = "\n".join(map(json.dumps, items))
    (tmp_path / "parity" / "test.jsonl").write_text(lines)
    page = 'doc_to_text: "{{text}} is"\ndoc_to_choice: [even, odd]\n'
    (tmp_path / "parity.yaml").write_text(page)
    return tmp_path / "parity.yaml"


def test_calibration_by_hand(ensemble: ModuleType) -> None:
    probabilities = torch.tensor([[0.95, 0.05], [0.93, 0.07], [0.38, 0.62], [0.35, 0.65]]).double()
    found = ensemble.Calibration.of(probabilities, torch.tensor([0, 1, 1, 1]))
    assert found.accuracy == 0.75
    right = (0.95, 0.07, 0.62, 0.65)
    assert found.nll == pytest.approx(-sum(map(math.log, right)) / 4)
    # Bins .9 to 1 (confidence .94, accuracy .5) and .6 to .7 (.635 and 1), two items each.
    assert found.ece == pytest.approx((2 * abs(0.94 - 0.5) + 2 * abs(0.635 - 1)) / 4)


def test_answers_are_those_of_the_model_alone(zoo: Zoo, task: Path, ensemble: ModuleType) -> None:
    read = ensemble.Task.read(task, "test", 5)
    assert read.prompts == ("0 is", "1 is", "2 is", "3 is", "4 is")
    actual = ensemble.answers(None, zoo.base(), read)
    model = AutoModelForCausalLM.from_pretrained(zoo.base(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(zoo.base())
    for row, prompt in zip(actual, read.prompts, strict=True):
        scores = []
        for choice in (" even", " odd"):
            tokens = tokenizer(prompt + choice, return_tensors="pt").input_ids
            logs = model(tokens).logits[0].double().log_softmax(dim=-1)
            places = range(len(prompt), len(prompt + choice))
            scores.append(sum(logs[p - 1, tokens[0, p]] for p in places))
        torch.testing.assert_close(row, torch.stack(scores).softmax(dim=0), rtol=1e-4, atol=1e-6)


def test_the_example_runs(zoo: Zoo, task: Path, ensemble: ModuleType) -> None:
    arguments = ["--base", zoo.base(), "--task", task, "--samples", "2"]
    arguments += ["--expert", zoo.adapter(1), "--expert", zoo.adapter(2)]
    ran = CliRunner().invoke(ensemble.main, [str(a) for a in arguments], catch_exceptions=False)
    assert ran.exit_code == 0
    lines = [line.split("  ")[0] for line in ran.output.splitlines() if "accuracy" not in line]
    names = [zoo.adapter(seed).name for seed in (1, 2)]
    assert lines[-6:] == [
        "base",
        *(f"expert {name}" for name in names),
        "mode",
        "one draw, T 1",
        "mode + 2 draws, T 1",
    ]
