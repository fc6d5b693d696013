"""Laws that Model Stock, KnOTS, TSV-M and Iso-C share, for the dense and the low-rank twin."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from poemerge.merge import merge_checkpoints
from poemerge.merging.plan import plan_merge
from poemerge.spectrum import svd
from poemerge.task_vector import DenseStack, LowRankStack
from poemerge.update import Dense, LowRank
from tests import reference
from tests.core.baselines import KEEP, SAME, solve, turn
from tests.core.stacks import Pair, assert_close, factors, merge, pair, update
from tests.core.stacks import product as products
from tests.core.test_certificates import KINDS, SHAPES, TWINS, distinct, one_huge
from tests.zoo import Zoo

METHODS = ("model_stock", "knots_ties", "tsv_m", "iso_c")
SPECTRAL = METHODS[1:]
COARSE = 1e-4  # updates in fp32


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Pair], list[float]]:
    """Experts of every kind, and their say."""
    kind, shape = draw(st.sampled_from(KINDS)), draw(st.sampled_from((*SHAPES, (12, 20))))
    count = draw(st.sampled_from((1, 2, 3, 9)))
    experts = kind(*shape, draw(st.sampled_from((1, 3))), count)
    return experts, [draw(st.sampled_from((0.0, 0.5, 1.0, 2.0))) for _ in experts]


def expected(experts: list[Pair], method: str, say: list[float]) -> Tensor:
    keep = [KEEP] if method == "knots_ties" else []
    return getattr(reference, method)(products(experts), say, *keep)


def assert_same(actual: Tensor, expected: Tensor, experts: list[Pair]) -> None:
    """Equal within SAME; of a merge that all but cancels, within what the experts' size leaves."""
    largest = max(float(a.norm()) for a in products(experts))
    size = max(float(expected.norm()), SAME * largest)
    assert float((actual - expected).norm()) <= SAME * size


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("twin", TWINS)
class TestEvery:
    @given(case=cases())
    def test_equals_the_reference(self, method: str, twin: str, case: tuple) -> None:
        experts, say = case
        assert_same(
            solve(experts, method, say, TWINS[twin]), expected(experts, method, say), experts
        )

    @given(case=cases(), data=st.data())
    def test_order_of_experts(
        self, method: str, twin: str, case: tuple, data: st.DataObject
    ) -> None:
        experts, say = case
        order = data.draw(st.permutations(range(len(say))))
        turned = solve([experts[i] for i in order], method, [say[i] for i in order], TWINS[twin])
        assert_same(turned, solve(experts, method, say, TWINS[twin]), experts)

    @given(case=cases(), factor=st.sampled_from((1e-4, 30.0)))
    def test_updates_of_every_size_are_treated_alike(
        self, method: str, twin: str, case: tuple, factor: float
    ) -> None:
        experts, say = case
        scaled = solve([(factor * up, down) for up, down in experts], method, say, TWINS[twin])
        assert_same(scaled / factor, solve(experts, method, say, TWINS[twin]), experts)

    @given(case=cases())
    def test_rotation(self, method: str, twin: str, case: tuple) -> None:
        """From either side; TIES reads the columns of its basis' coordinates as they are."""
        experts, say = case
        rows, columns = len(experts[0][0]), experts[0][1].shape[1]
        left, right = turn(rows, 1), turn(columns, 2)
        if method == "knots_ties":
            right = torch.eye(columns, dtype=torch.float64)
        turned = [(left @ up, down @ right) for up, down in experts]
        merged = solve(experts, method, say, TWINS[twin])
        assert_same(solve(turned, method, say, TWINS[twin]), left @ merged @ right, experts)

    @given(case=cases())
    def test_an_expert_of_zeros_or_of_no_weight_has_no_say(
        self, method: str, twin: str, case: tuple
    ) -> None:
        experts, say = case
        merged = solve(experts, method, say, TWINS[twin])
        up, down = experts[0]
        idle = solve([*experts, (torch.zeros_like(up), down)], method, [*say, 1.0], TWINS[twin])
        mute = solve([*experts, (up + 1, down)], method, [*say, 0.0], TWINS[twin])
        assert_same(idle, merged, experts)
        assert_same(mute, merged, experts)

    def test_batches_are_solved_apart(self, method: str, twin: str) -> None:
        """However different their sizes and the spaces that they span."""
        batch = [
            distinct(9, 7, 2, 3),
            one_huge(9, 7, 2, 3),
            [(0 * u, d) for u, d in distinct(9, 7, 2, 3)],
        ]
        batch[0][1] = (0 * batch[0][1][0], batch[0][1][1])
        stacks = [TWINS[twin](experts) for experts in batch]
        together = merge(_join(stacks), method).update.dense()
        for index, stack in enumerate(stacks):
            assert_close(together[index], update(merge(stack, method)))

    def test_updates_in_fp32(self, method: str, twin: str) -> None:
        exact = distinct(40, 24, 3, 4)
        single = [(up.float(), down.float()) for up, down in exact]
        assert_close(solve(single, method, twin=TWINS[twin]).double(), solve(exact, method), COARSE)


def _join(stacks: list) -> DenseStack | LowRankStack:
    if isinstance(stacks[0], DenseStack):
        return DenseStack(torch.cat([stack.deltas for stack in stacks]))
    ups, downs = ([getattr(s, side) for s in stacks] for side in ("ups", "downs"))
    return LowRankStack(*(tuple(map(torch.cat, zip(*f, strict=True))) for f in (ups, downs)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", [(2, 3, 0), (4, 9, 3)])
def test_adapters_stay_in_factors(method: str, ranks: tuple[int, ...]) -> None:
    """Whatever their ranks: none at all, or more together than the matrix has rows."""
    merged = merge(factors([pair(12, rank, 10, seed) for seed, rank in enumerate(ranks)]), method)
    assert isinstance(merged.update, LowRank)
    limit = {"model_stock": sum(ranks), "knots_ties": min(12, sum(ranks))}
    limit = limit.get(method, min(12, 10, sum(ranks)))
    assert merged.update.rank <= limit


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (1, 5), (5, 1), (1, 1)])
def test_svd_multiplies_to_the_update(shape: tuple[int, int]) -> None:
    up, down = pair(shape[0], 3, shape[1], seed=0)
    for given_, rank in ((Dense(up @ down), min(*shape, 3)), (LowRank(up, down), min(*shape, 3))):
        left, sizes, right = svd(given_)
        assert_close(left @ torch.diag(sizes) @ right.T, up @ down)
        assert int((sizes > 0).sum()) == rank
        assert (sizes[:-1] >= sizes[1:]).all()
        assert_close(left[:, :rank].T @ left[:, :rank], torch.eye(rank, dtype=torch.float64))


@pytest.mark.parametrize("method", SPECTRAL)
def test_vocabularies_and_vectors_are_averaged(zoo: Zoo, tmp_path: Path, method: str) -> None:
    """No side is theirs: rows of tokens have no joint directions to speak of."""
    experts = {f"e{seed}": zoo.full(seed) for seed in (1, 2)}
    with plan_merge(zoo.base(), experts, method, {}) as plan:
        rules = plan.rules
    merge_checkpoints(zoo.base(), experts, tmp_path / "out", method, "cpu")
    stored = [load_file(p / "model.safetensors") for p in (tmp_path / "out", *experts.values())]
    for name, rule in rules.items():
        matrix = stored[0][name].ndim == 2 and not name.startswith(("model.embed", "lm_head"))
        assert rule == ("matrix" if matrix else "average")
        if rule == "average":
            assert_close(stored[0][name], (stored[1][name] + stored[2][name]) / 2)


@pytest.mark.parametrize("method", METHODS)
def test_merged_adapters_are_the_merge_of_full_models(
    zoo: Zoo, tmp_path: Path, method: str
) -> None:
    experts = [zoo.adapter(seed, r=rank) for seed, rank in ((1, 2), (2, 4), (3, 3))]
    adapter, full = tmp_path / "adapter", tmp_path / "full"
    merge_checkpoints(zoo.base(), experts, adapter, method, "cpu", output="adapter")
    merge_checkpoints(zoo.base(), experts, full, method, "cpu")
    merge_checkpoints(zoo.base(), [adapter], tmp_path / "applied", "average", "cpu")
    applied = load_file(tmp_path / "applied" / "model.safetensors")
    for name, weight in load_file(full / "model.safetensors").items():
        assert_close(applied[name], weight, 1e-6)
