"""The recipe in data/experts makes adapters and full fine-tunes, leaves and resumes them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from poemerge.hashing import hash_files
from tests.zoo import Zoo

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "data/experts"
TASK = "language"  # its prompts are the shortest


@pytest.fixture(scope="module")
def train() -> Iterator[ModuleType]:
    """The script, with the repository's root as its working directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.syspath_prepend(RECIPE)
        import train

        yield train


@pytest.fixture(scope="module")
def made(train: ModuleType, zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One expert of each kind, after two steps."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("lora", "full")}
    for kind, folder in folders.items():
        train.main(options(kind, zoo.base("bfloat16"), folder))
    return {kind: folder / TASK for kind, folder in folders.items()}


def options(kind: str, base: Path, out: Path, steps: int = 2) -> list[str]:
    named = {"--kind": kind, "--base": base, "--out": out, "--steps": steps}
    return [TASK, *(str(part) for pair in named.items() for part in pair)]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_expert_that_is_complete_is_left_as_it_is(
    kind: str, train: ModuleType, zoo: Zoo, made: dict[str, Path]
) -> None:
    weights = next(made[kind].glob("*model.safetensors"))
    before = weights.stat()
    train.main(options(kind, zoo.base("bfloat16"), made[kind].parent))
    after = weights.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [path.name for path in made[kind].parent.iterdir()] == [TASK]


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    train: ModuleType, zoo: Zoo, made: dict[str, Path], tmp_path: Path
) -> None:
    for seed in ("0", "1"):
        arguments = options("lora", zoo.base("bfloat16"), tmp_path / seed)
        train.main([*arguments, "--seed", seed])
    first, same, other = (
        hash_files(f) for f in (made["lora"], *(tmp_path / s / TASK for s in "01"))
    )
    assert first == same
    assert first["adapter_model.safetensors"] != other["adapter_model.safetensors"]


def test_every_expert_has_a_seed_of_its_own(train: ModuleType) -> None:
    tasks = [path.stem for path in (ROOT / "data/tasks").glob("*.yaml")]
    seeds = [train.seed_of(task, seed) for task in tasks for seed in range(100)]
    assert len({*seeds}) == len(seeds)
    assert train.seed_of("language", 0) == 678_095_513  # on every machine, in every process


def test_an_adapter_moves_every_linear_layer(made: dict[str, Path]) -> None:
    settings = json.loads((made["lora"] / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    factors = load_file(made["lora"] / "adapter_model.safetensors")
    assert len(factors) == 2 * 7 * 2  # A and B of 7 layers in 2 blocks
    assert {value.dtype for value in factors.values()} == {torch.float16}
    assert all(value.any() for value in factors.values())


def test_a_full_fine_tune_is_a_checkpoint_like_its_base(zoo: Zoo, made: dict[str, Path]) -> None:
    base = zoo.base("bfloat16")
    after, before = (load_file(f / "model.safetensors") for f in (made["full"], base))
    assert after.keys() == before.keys()
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert hash_files(base).keys() == hash_files(made["full"]).keys()
    assert any((after[name] != before[name]).any() for name in after)


def test_a_killed_full_fine_tune_goes_on_to_the_same_bytes(
    train: ModuleType, zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    kill_after_first_state(options("full", zoo.base(), cut, steps=40), cut)
    assert not (cut / TASK).exists()
    for out in (cut, whole):
        train.main(options("full", zoo.base(), out, steps=40))
    assert capsys.readouterr().err.count("goes on after step 20") == 1
    assert hash_files(cut / TASK) == hash_files(whole / TASK)
    assert [path.name for path in cut.iterdir() if path.name.endswith(".state")] == []


def kill_after_first_state(arguments: list[str], out: Path) -> None:
    """Run the script and kill it (SIGKILL) as soon as it has saved a state."""
    command = [sys.executable, str(RECIPE / "train.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (out / f"{TASK}.state").exists():
            time.sleep(0.01)
        process.kill()


def test_a_state_of_another_training_is_not_taken(
    train: ModuleType, zoo: Zoo, made: dict[str, Path], tmp_path: Path
) -> None:
    torch.save({"key": "of something else"}, tmp_path / f"{TASK}.state")
    train.main(options("full", zoo.base("bfloat16"), tmp_path))
    assert hash_files(tmp_path / TASK) == hash_files(made["full"])


@pytest.mark.parametrize("mistake", [["nonesuch"], ["--base", "/nowhere"]])
def test_a_mistake_gets_a_sentence(
    mistake: list[str], train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path), *mistake])
    assert mistake[-1] in capsys.readouterr().err
