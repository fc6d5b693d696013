"""Experts that are none: of another base, the base itself, twice the same, of another size."""

import logging
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from flows.cli import main
from poemerge.merging.terms import Terms
from tests.reliability.traps import FILE, METHODS, Trap, change
from tests.reliability.trials import Trials
from tests.zoo import Zoo

HEAVY = ("cauchy_poe", "student_t_poe")


def test_another_base(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """An expert of another base with the same shapes is refused, and merged only where asked"""
    for number in trials(short=3, full=50):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)

            def train_elsewhere(tensors: dict[str, Tensor], trap: Trap = trap) -> None:
                for name, weight in tensors.items():
                    if weight.dim() == 2:
                        noise = torch.randn(weight.shape, generator=trap.generator)
                        tensors[name] = weight.std() * noise

            experts = trap.among(change(trap.full(), train_elsewhere))
            trap.refused("Expert 'trapped' .* was not fine-tuned from this base", experts)
            trap.warned("was not fine-tuned from this base", experts, foreign="warn")


def test_a_fine_tune_is_no_stranger(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """A fine-tune is taken for one, however far it moved and in whatever dtype it is"""
    for number in trials(short=3, full=50):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            noise = trap.draw.choice([1e-4, 1e-3, 1e-2, 2e-2, 5e-2])
            dtype = trap.draw.choice(["float32", "bfloat16", "float16"])
            notes = trap.notes({"far": trap.full(dtype=dtype, noise=noise)}, zoo.base(dtype))
            assert not any("fine-tuned" in note or "left in" in note for note in notes)


def test_the_base_itself(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """An expert that equals the base is refused by check and merge alike"""
    for number in trials(short=3, full=50):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            copy = trap.copy(zoo.base(sharded=trap.draw.random() < 0.5), "copy")
            trap.refused("Expert 'trapped' .* changes nothing.*; leave it out", trap.among(copy))


def test_twice_the_same(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """Experts of equal values are told to count twice, though their files differ"""
    for number in trials(short=3, full=50):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            seed, adapter = trap.draw.randint(1, 4), trap.draw.random() < 0.3
            if adapter:
                pair = [zoo.adapter(seed), trap.copy(zoo.adapter(seed), "again")]
            else:
                pair = [zoo.full(seed), zoo.full(seed, sharded=True)]
            experts = {"one": pair[0], "other": trap.other(), "two": pair[1]}
            part = "Experts 'one' and 'two' are equal in all values that were looked at"
            trap.warned(part, experts)
            assert not any("are equal" in n for n in trap.notes({"a": pair[0], "b": trap.other()}))


def test_much_larger(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """An expert 1000 times larger is named; it outweighs a Gaussian merge, and no Cauchy one"""
    start = load_file(zoo.base() / FILE)
    for number in trials(short=4, full=50):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            trap.method = trap.draw.choice(("average", "ties", "gaussian_poe", *HEAVY))

            def enlarge(tensors: dict[str, Tensor]) -> None:
                tensors |= {n: start[n] + 1000 * (w - start[n]) for n, w in tensors.items()}

            sound = trap.other()
            experts = {"big": change(trap.full(), enlarge), "sound": sound}
            heavy = trap.method in HEAVY
            effect = "the heavy tail of" if heavy else f"under {trap.method} it outweighs them"
            said = trap.warned("Expert 'big' moves the base ", experts).warnings[0]
            assert re.search(rf"(9\d\d|10\d\d) times as far as the others do, and {effect}", said)
            _, merged = trap.merge(experts)
            followed = load_file((sound if heavy else experts["big"]) / FILE)
            for name in (n for n in start if "proj" in n):
                moved, wanted = merged[name] - start[name], followed[name] - start[name]
                assert torch.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0) > 0.7


def test_not_finite(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """NaN or infinity anywhere is refused, with the tensor and whose it is"""
    for number in trials(short=4, full=100):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            folder = trap.full()
            name = trap.draw.choice(sorted(load_file(folder / FILE)))
            value = trap.draw.choice([float("nan"), float("inf"), float("-inf")])

            weights = load_file(folder / FILE)
            flat = weights[name].flatten()
            flat[trap.draw.randrange(len(flat))] = value
            change(folder, lambda t, n=name, f=flat: t.update({n: f.view(t[n].shape)}))
            experts = trap.among(folder)
            pattern = f"{name} of expert 'trapped' .* holds NaN or infinite values"
            trap.refused(pattern, experts, deep=True)


def test_check_tells(zoo: Zoo, tmp_path: Path) -> None:
    """The command: exit code 1 and one sentence; 0 and one note."""
    trap = Trap(zoo, tmp_path, 1)
    stranger = change(
        trap.full(), lambda t: t.update({n: w.std() * torch.randn(w.shape) for n, w in t.items()})
    )
    words = ["check", "--base", str(zoo.base()), "--expert", f"a={stranger}"]
    found = CliRunner().invoke(main, words)
    assert found.exit_code == 1
    assert "not fine-tuned from this base" in " ".join(found.stderr.split())
    found = CliRunner().invoke(main, [*words, "--foreign", "warn"])
    assert found.exit_code == 0
    assert " ".join(found.output.split()).count("not fine-tuned from this base") == 1
    found = CliRunner().invoke(main, [*words, "--expert", f"a={zoo.full(1)}"])
    assert found.exit_code == 1
    assert "Two sources are named 'a'" in found.stderr


def test_one_warning_for_many_tensors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, zoo: Zoo
) -> None:
    """Not one a tensor: in the log, the report and the card."""
    trap = Trap(zoo, tmp_path, 2)
    weights = [torch.randn(16, 16, generator=trap.generator) for _ in range(200)]
    folders = {}
    for index, size in enumerate((0, 1e-4, 1e-1)):
        folders[str(index)] = tmp_path / f"expert-{index}"
        folders[str(index)].mkdir(exist_ok=True)
        noise = (torch.randn(16, 16, generator=trap.generator) for _ in weights)
        tensors = {f"{i}.w": w + size * next(noise) for i, w in enumerate(weights)}
        save_file(tensors, folders[str(index)] / FILE)
    base = folders.pop("0")
    with caplog.at_level(logging.WARNING):
        trap.warned("Expert '2' moves the base", folders, base)
    assert caplog.text.count("moves the base") == 1
    assert trap.notes(folders, base, Terms(deep=True)) == trap.notes(folders, base)
    assert trap.method in METHODS
