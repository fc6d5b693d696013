"""Tensors of odd shapes, kinds, names and homes: merged to the right numbers, or refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from poemerge.errors import CheckpointError
from poemerge.merge import merge_checkpoints
from poemerge.method import Call
from poemerge.methods import METHODS, find
from poemerge.task_vector import DenseStack
from tasks.fetch import fetch
from tests.reliability.traps import FILE, Trap, change, made_of
from tests.reliability.trials import Trials
from tests.zoo import Zoo

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = (
    "a/b.weight", "../up.weight", "/etc/passwd", "层.ü😀.weight", "a b.weight", "a\nb.weight",
    "", ".", "w" * 3000, "%s{}.weight", "a\\b", "[x]*.weight", "__metadata.weight", "é.weight",
)  # fmt: skip
ODD = {
    "a number": (),
    "no rows": (0, 4),
    "no columns": (3, 0),
    "nothing": (0,),
    "one number": (1,),
    "one row": (1, 5),
    "one column": (5, 1),
    "four axes": (2, 3, 2, 1),
    "an empty axis": (2, 0, 3),
}
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)


def beside(trap: Trap, extra: Callable[[int], dict[str, Tensor]]) -> list[Path]:
    """A base and two experts of one matrix, and of what `extra` gives for 0, 1, 2."""
    start = torch.randn(16, 12, generator=trap.generator)
    folders = []
    for index, name in enumerate(("base", "one", "two")):
        moved = 0.1 * index * torch.randn(16, 12, generator=trap.generator)
        folders.append(made_of(trap.root, name, {"w.weight": start + moved, **extra(index)}))
    return folders


def test_sharded_otherwise(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """How experts are sharded changes no byte of a merge, and how the base is only rounding"""
    for number in trials(short=3, full=50):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            seeds = trap.draw.sample(range(1, 6), 2)
            whole = {str(seed): zoo.full(seed) for seed in seeds}
            parts = {str(seed): zoo.full(seed, sharded=trap.draw.random() < 0.7) for seed in seeds}
            outs = [trap.root / "whole", trap.root / "parts", trap.root / "sharded"]
            bases = [zoo.base(), zoo.base(), zoo.base(sharded=True)]
            for base, experts, out in zip(bases, (whole, parts, parts), outs, strict=True):
                merge_checkpoints(base, experts, out, trap.method, "cpu")
            assert (outs[0] / FILE).read_bytes() == (outs[1] / FILE).read_bytes()
            shards = [load_file(path) for path in sorted(outs[2].glob("*.safetensors"))]
            assert len(shards) > 1
            found = {name: weight for part in shards for name, weight in part.items()}
            wanted = load_file(outs[0] / FILE)  # solved in larger batches
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_dtypes(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """Experts in another dtype than the base merge, and what is written in which is said"""
    for number in trials(short=4, full=60):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            trap.method = "average"
            ours, theirs, wanted = (trap.draw.choice(list(DTYPES)) for _ in range(3))
            wanted = trap.draw.choice([wanted, "source"])
            folder = trap.full()
            change(folder, lambda t, d=DTYPES[theirs]: t.update({n: w.to(d) for n, w in t.items()}))
            base, experts = zoo.base(ours), {"a": folder}
            report, merged = trap.merge(experts, base, dtype=wanted)
            written = ours if wanted == "source" else wanted
            assert {str(w.dtype) for w in merged.values()} == {f"torch.{written}"}
            said = f"stored as {ours} and 'a' as {theirs}; the merge is written as {written}"
            assert sum(said in note for note in report.warnings) == (ours != theirs)
            for name, weight in load_file(folder / FILE).items():
                start = load_file(base / FILE)[name].float()
                expected = (start + (weight.float() - start)).to(DTYPES[written])
                assert torch.equal(merged[name], expected), name


@pytest.mark.parametrize(
    ("ours", "theirs", "part"),
    [
        ("float32", "bfloat16", "is stored as bfloat16, and rounding the base to that is"),
        ("bfloat16", "float32", "of what expert 'a' changes; choose a wider `dtype`"),
    ],
)
def test_small_updates_that_rounding_drowns(
    zoo: Zoo, tmp_path: Path, ours: str, theirs: str, part: str
) -> None:
    trap = Trap(zoo, tmp_path, 1)
    moved = {"small": 1e-5, "large": 1e-2}
    for size, noise in moved.items():
        start = load_file(zoo.base(ours) / FILE)
        tensors = {
            n: (w.float() + noise * torch.randn(w.shape, generator=trap.generator)).to(
                DTYPES[theirs]
            )
            for n, w in start.items()
        }
        notes = trap.notes({"a": made_of(trap.root, size, tensors)}, zoo.base(ours))
        assert sum(part in note for note in notes) == (size == "small")


def test_integers(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """Integer and boolean buffers are the base's to the bit, and an expert's other ones are told"""
    for number in trials(short=3, full=60):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            dtype, differs = trap.draw.choice(INTEGERS), trap.draw.random() < 0.5
            shape = trap.draw.choice([(), (7,), (3, 5)])
            values = torch.randint(0, 2, shape, generator=trap.generator)

            def buffer(
                index: int,
                values: Tensor = values,
                dtype: torch.dtype = dtype,
                differs: bool = differs,
            ) -> dict[str, Tensor]:
                return {"buffer": (1 - values if differs and index == 2 else values).to(dtype)}

            base, one, two = beside(trap, buffer)
            report, merged = trap.merge({"one": one, "two": two}, base)
            assert torch.equal(merged["buffer"], values.to(dtype))
            said = "Expert 'two' has other integers than the base in buffer"
            assert sum(said in warning for warning in report.warnings) == differs


def test_floats_for_integers(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """A tensor of integers on one side and floats on the other is refused by name"""
    for number in trials(short=2, full=30):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            kinds = [torch.float32, trap.draw.choice(INTEGERS)]
            trap.draw.shuffle(kinds)
            base, one, two = beside(
                trap, lambda index, k=kinds: {"v": torch.ones(4).to(k[index == 1])}
            )
            trap.refused("v is stored as .* in expert 'one'", {"two": two, "one": one}, base)


def test_names(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """Tensors of any name merge: slashes, dots, Unicode, spaces, none at all"""
    for number in trials(short=4, full=56):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            trap.method, name = "average", NAMES[number % len(NAMES)]
            values = [torch.randn(6, 4, generator=trap.generator) for _ in range(3)]
            values = [values[0], *(values[0] + 0.1 * value for value in values[1:])]
            base, one, two = beside(trap, lambda index, n=name, v=values: {n: v[index]})
            before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(trap.root)}
            report, merged = trap.merge({"one": one, "two": two}, base)
            assert before == {p for p in tmp_path.rglob("*") if not p.is_relative_to(trap.root)}
            assert name in {tensor.name for tensor in report.tensors}
            torch.testing.assert_close(merged[name], (values[1] + values[2]) / 2)


def test_odd_shapes(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """Numbers without an axis, empty tensors and single rows merge under every method"""
    for number in trials(short=11, full=99):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            trap.method = list(METHODS)[number % len(METHODS)]
            values = {
                name: [torch.randn(shape, generator=trap.generator) for _ in range(3)]
                for name, shape in ODD.items()
            }
            folders = beside(trap, lambda index, v=values: {name: v[name][index] for name in v})
            report, merged = trap.merge(dict(zip("ab", folders[1:], strict=True)), folders[0])
            for name, shape in ODD.items():
                assert merged[name].shape == shape
                assert bool(merged[name].isfinite().all())
            if trap.method == "average":
                for name, (_, one, two) in values.items():
                    torch.testing.assert_close(merged[name], (one + two) / 2)
            assert {t.rule for t in report.tensors if 0 in t.shape} == {"copy"}


def test_complex(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """Complex tensors are refused, with their name"""
    for number in trials(short=2, full=20):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            bad = trap.draw.choice([0, 1, 2])

            def extra(index: int, bad: int = bad) -> dict[str, Tensor]:
                return {
                    "c": torch.ones(3, dtype=torch.complex64 if index == bad else torch.float32)
                }

            base, one, two = beside(trap, extra)
            trap.refused("c in .* holds complex numbers", {"one": one, "two": two}, base)


def test_shared_memory(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """Views, transposes and aliases saved by torch are fetched with the right values"""
    for number in trials(short=3, full=50):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            storage = torch.randn(12, 10, generator=trap.generator)
            start = trap.draw.randrange(4)
            state = {
                "whole": storage,
                "turned": storage.T,
                "rows": storage[start : start + 5],
                "columns": storage[:, start::2],
                "again": storage,
                "number": storage[start, 3],
                "spread": storage[:1].expand(4, 10),
            }
            wanted = {name: tensor.clone() for name, tensor in state.items()}
            source = trap.root / "source"
            source.mkdir()
            (source / "config.json").write_text("{}")
            torch.save(state, source / "pytorch_model.bin")
            fetch.fn("base", str(source), trap.root / "out")
            found = load_file(trap.root / "out" / FILE)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_views_in_methods(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """Methods give the same numbers for views as for copies, and leave what they got alone"""
    for number in trials(short=11, full=55):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            method = find(list(METHODS)[number % len(METHODS)])
            wide = 0.1 * torch.randn(1, 3, 12, 32, generator=trap.generator)
            view, before = wide.mT[..., ::2], wide.clone()  # (1, 3, 32, 6), no axis contiguous
            settings = method.settings.parse({})
            call = Call(torch.ones(1, 3, dtype=torch.float64), ((1, 2, 3),))
            found, wanted = (
                method.merge(DenseStack(deltas), settings, call).update.dense()
                for deltas in (view, view.clone(memory_format=torch.contiguous_format))
            )
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
            assert torch.equal(wide, before)


def test_quantised_names_its_format(tmp_path: Path) -> None:
    made_of(tmp_path, "base", {"c": torch.ones(3).to(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match="stored as F8_E4M3, a quantised format; merge the"):
        merge_checkpoints(tmp_path / "base", {"a": tmp_path / "base"}, tmp_path / "out")
