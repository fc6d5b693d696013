"""The methods against tests/reference.py, and the table that they are in."""

import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

import poemerge
from poemerge.merging.apply import seed_of
from poemerge.method import METHODS, Call
from poemerge.methods import find
from poemerge.methods.dare_ties import drop_and_rescale
from poemerge.task_vector import DenseStack
from poemerge.update import LowRank
from tests import reference
from tests.core.stacks import assert_close, dense, distance, factors, merge, pair, update
from tests.core.stacks import product as products

EXPERTS = [pair(9, 3, 6, seed) for seed in range(4)]
WEIGHTS = (1.0, 0.5, 2.0, 0.25)
PUBLISHED = 1e-4  # relative; the published code stops at an absolute 1e-5


def sheet(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("twin", [dense, factors])
@pytest.mark.parametrize("method", ["average", "task_arithmetic"])
def test_linear_methods(twin: object, method: str) -> None:
    expected = getattr(reference, method)(products(EXPERTS), WEIGHTS)
    merged = merge(twin(EXPERTS), method, WEIGHTS)
    assert_close(update(merged), expected)
    assert isinstance(merged.update, LowRank) == (twin is factors)


@pytest.mark.parametrize("twin", [dense, factors])
@pytest.mark.parametrize("keep", [0.05, 0.2, 0.5, 1.0])
def test_ties(twin: object, keep: float) -> None:
    expected = reference.ties(products(EXPERTS), WEIGHTS, keep)
    assert_close(update(merge(twin(EXPERTS), "ties", WEIGHTS, keep=keep)), expected)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (2, 3, 4)])
def test_elementwise_methods_take_tensors_of_any_shape(shape: tuple[int, ...]) -> None:
    updates = [sheet(*shape, seed=seed) for seed in range(3)]
    stack = DenseStack(torch.stack(updates).unsqueeze(0))
    for method in ("average", "task_arithmetic", "ties"):
        settings = {"keep": 0.5} if method == "ties" else {}
        args = [0.5] if method == "ties" else []
        expected = getattr(reference, method)(updates, [1.0] * 3, *args)
        actual = update(merge(stack, method, [1.0] * 3, **settings))
        assert_close(actual, expected.reshape(shape))


def test_trim_keeps_what_is_as_large_as_the_smallest_kept() -> None:
    """Coarse dtypes make many equal magnitudes; an arbitrary choice would not be reproducible."""
    stack = DenseStack(torch.tensor([0.5, -0.5, 0.5, 0.1, 0.0]).view(1, 1, 5))
    kept = update(merge(stack, "ties", keep=0.2))
    assert kept.tolist() == pytest.approx([0.5, -0.5, 0.5, 0.0, 0.0])
    assert update(merge(stack, "ties", keep=0.0)).any()


def test_ties_of_one_expert_is_that_expert_trimmed() -> None:
    one = EXPERTS[:1]
    assert_close(update(merge(dense(one), "ties", keep=1.0)), products(one)[0])


class TestDare:
    DROP = 0.7

    def draw(self, deltas: Tensor, seeds: tuple[int, ...]) -> Tensor:
        return drop_and_rescale(deltas.expand(1, len(seeds), *deltas.shape), self.DROP, (seeds,))

    def test_what_is_kept_is_divided_by_the_probability_to_keep_it(self) -> None:
        deltas = sheet(20, 30, seed=0)
        dropped = self.draw(deltas, (1,))[0, 0]
        kept = dropped != 0
        assert torch.equal(dropped[kept], (deltas / (1 - self.DROP))[kept])
        assert 0.25 < kept.double().mean() < 0.35

    def test_the_expected_value_is_kept(self) -> None:
        """Mean over many seeds within 4 standard errors, which one entry in 16 000 exceeds."""
        deltas, count = sheet(8, 10, seed=1), 4000
        draws = self.draw(deltas, tuple(range(count)))[0]
        error = deltas.abs() * (self.DROP / (1 - self.DROP) / count) ** 0.5
        assert ((draws.mean(dim=0) - deltas).abs() <= 4 * error).all()

    def test_a_seed_is_a_mask(self) -> None:
        deltas = sheet(8, 10, seed=1)
        twice = self.draw(deltas, (3, 3, 4))[0]
        assert torch.equal(twice[0], twice[1])
        assert not torch.equal(twice[0], twice[2])

    def test_nothing_dropped_is_ties(self) -> None:
        call = Call(torch.ones(1, 4, dtype=torch.float64), ((0, 1, 2, 3),))
        settings = find("dare_ties").settings.parse({"drop": 0.0, "keep": 0.5})
        merged = find("dare_ties").merge(dense(EXPERTS), settings, call)
        assert_close(update(merged), update(merge(dense(EXPERTS), "ties", keep=0.5)))

    def test_order_of_experts_does_not_matter(self) -> None:
        """Each expert's mask is its own: seeded by run, tensor and name, not by place."""
        names, say = ("a", "b", "c", "d"), torch.tensor(WEIGHTS, dtype=torch.float64)
        merged = []
        for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
            seeds = tuple(seed_of(0, "q_proj.weight", names[i]) for i in order)
            stack = dense([EXPERTS[i] for i in order])
            settings = find("dare_ties").settings.parse({})
            call = Call(say[None, list(order)], (seeds,))
            merged.append(update(find("dare_ties").merge(stack, settings, call)))
        assert_close(merged[0], merged[1])

    def test_every_draw_has_a_seed_of_its_own(self) -> None:
        asked = [(s, t, e) for s in (0, 1) for t in ("a", "a/b") for e in ("b/c", "c", "x")]
        seeds = {seed_of(*key) for key in asked}
        assert len(seeds) == len(asked)
        assert all(0 <= seed < 2**63 for seed in seeds)


class TestPublished:
    """`preset: paper` gives the numbers of the published procedure."""

    @pytest.mark.parametrize("size", [0.05, 0.3, 1.0])
    @pytest.mark.parametrize("shape", [(8, 8), (24, 8), (6, 10), (10, 6)])
    @pytest.mark.parametrize("epsilon", [0.01, 0.3, 2.0])
    def test_cauchy(self, shape: tuple[int, int], epsilon: float, size: float) -> None:
        updates = [size * sheet(*shape, seed=seed) for seed in range(4)]
        stack = DenseStack(torch.stack(updates).unsqueeze(0).float())
        merged = update(merge(stack, "cauchy_poe", preset="paper", epsilon=epsilon))
        assert_close(merged, reference.published(updates, epsilon), PUBLISHED)

    @pytest.mark.parametrize("shape", [(8, 8), (24, 8), (6, 10), (10, 6)])
    def test_gaussian(self, shape: tuple[int, int]) -> None:
        updates = [0.3 * sheet(*shape, seed=seed) for seed in range(4)]
        stack = DenseStack(torch.stack(updates).unsqueeze(0))
        merged = update(merge(stack, "gaussian_poe", preset="paper"))
        assert_close(merged, reference.published(updates, None))

    def test_low_rank_is_solved_whole(self) -> None:
        experts = [(0.3 * up, down) for up, down in EXPERTS]
        merged = update(merge(factors(experts), "cauchy_poe", preset="paper", epsilon=2.0))
        assert_close(merged, reference.published(products(experts), 2.0), PUBLISHED)

    def test_a_given_setting_wins_over_the_preset(self) -> None:
        settings = find("cauchy_poe").settings.parse({"preset": "paper", "ridge": 0.5})
        assert (settings.ridge, settings.side, settings.ridge_mode) == (0.5, "output", "absolute")


@pytest.mark.parametrize("name", METHODS)
class TestTable:
    def test_is_documented(self, name: str) -> None:
        method = METHODS[name]
        assert method.name == name
        assert method.summary.endswith(".")
        assert "arXiv" in method.source
        for setting, default, meaning in method.settings.describe():
            assert len(meaning) > 10, setting
            assert default is not None

    def test_defaults_are_accepted(self, name: str) -> None:
        settings = METHODS[name].settings
        defaults = {setting: default for setting, default, _ in settings.describe()}
        assert settings.parse(defaults) == settings.parse({}) == settings()

    def test_every_preset_is_accepted(self, name: str) -> None:
        settings = METHODS[name].settings
        for preset, values in settings.presets.items():
            assert values.keys() <= {field.name for field in fields(settings)}
            parsed = settings.parse({"preset": preset})
            assert all(getattr(parsed, key) == value for key, value in values.items())

    def test_a_method_changes_nothing_it_is_given(self, name: str) -> None:
        stack = dense(EXPERTS)
        before = stack.deltas.clone()
        seeds = ((0, 1, 2, 3),)
        settings = METHODS[name].settings.parse({})
        METHODS[name].merge(stack, settings, Call(torch.ones(1, 4, dtype=torch.float64), seeds))
        assert torch.equal(stack.deltas, before)


def test_the_table_is_what_design_promises() -> None:
    promised = {"average", "task_arithmetic", "ties", "dare_ties", "gaussian_poe", "cauchy_poe"}
    promised |= {"model_stock", "knots_ties", "tsv_m", "iso_c"}
    assert promised <= METHODS.keys()


METHOD = '''
"""The first expert."""

from poemerge.method import Call, Merged, register
from poemerge.settings import Settings
from poemerge.task_vector import Stack
from poemerge.update import Dense


@register(settings=Settings, source="nobody")
def first(stack: Stack, settings: Settings, call: Call) -> Merged:
    """The first expert alone."""
    return Merged(Dense(stack.dense()[:, 0]))
'''


def test_a_file_in_the_folder_is_a_method(tmp_path: Path) -> None:
    """Nothing else is to be touched in order to add one."""
    shutil.copytree(Path(poemerge.__file__).parent, tmp_path / "poemerge")
    (tmp_path / "poemerge/methods/first.py").write_text(METHOD)
    ask = "from poemerge.methods import find; print(find('first').summary)"
    told = subprocess.run(
        [sys.executable, "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert told.stdout == "The first expert alone.\n"


def test_methods_differ() -> None:
    """No two methods of the table are one another under another name."""
    results = {}
    for name, method in METHODS.items():
        call = Call(torch.ones(1, 4, dtype=torch.float64), ((0, 1, 2, 3),))
        results[name] = update(method.merge(dense(EXPERTS), method.settings.parse({}), call))
    names = sorted(results)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            assert distance(results[name], results[other]) > 1e-3, (name, other)
