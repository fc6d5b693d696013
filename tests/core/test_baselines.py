"""Laws of Model Stock, KnOTS, TSV-M and Iso-C, each for the dense and the low-rank twin."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from poemerge.merge import merge_checkpoints
from poemerge.merging.plan import plan_merge
from poemerge.spectrum import orthogonalised, svd
from poemerge.task_vector import DenseStack, LowRankStack
from poemerge.update import Dense, LowRank
from tests import reference
from tests.core.stacks import Pair, assert_close, dense, distance, factors, merge, pair, update
from tests.core.stacks import product as products
from tests.core.test_certificates import KINDS, SHAPES, TWINS, distinct, one_huge
from tests.zoo import Zoo

METHODS = ("model_stock", "knots_ties", "tsv_m", "iso_c")
SPECTRAL = METHODS[1:]
KEEP = 0.4
SAME = 1e-6  # of directions whose singular value is 1e-5 of the largest
COARSE = 1e-4  # updates in fp32


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Pair], list[float]]:
    """Experts of every kind, and their say."""
    kind, shape = draw(st.sampled_from(KINDS)), draw(st.sampled_from((*SHAPES, (12, 20))))
    count = draw(st.sampled_from((1, 2, 3, 9)))
    experts = kind(*shape, draw(st.sampled_from((1, 3))), count)
    return experts, [draw(st.sampled_from((0.0, 0.5, 1.0, 2.0))) for _ in experts]


def solve(experts: list[Pair], method: str, say: list[float] | None = None, twin=dense) -> Tensor:  # noqa: ANN001
    settings = {"keep": KEEP} if method == "knots_ties" else {}
    return update(merge(twin(experts), method, say, **settings))


def expected(experts: list[Pair], method: str, say: list[float]) -> Tensor:
    keep = [KEEP] if method == "knots_ties" else []
    return getattr(reference, method)(products(experts), say, *keep)


def assert_same(actual: Tensor, expected: Tensor, experts: list[Pair]) -> None:
    """Equal within SAME; of a merge that all but cancels, within what the experts' size leaves."""
    largest = max(float(a.norm()) for a in products(experts))
    size = max(float(expected.norm()), SAME * largest)
    assert float((actual - expected).norm()) <= SAME * size


def turn(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


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


class TestModelStock:
    def test_one_expert_is_itself_and_so_are_identical_ones(self) -> None:
        experts = distinct(6, 5, 2, 1)
        for count in (1, 3):
            assert_close(solve(experts * count, "model_stock"), products(experts)[0])

    def test_orthogonal_experts_leave_the_base(self) -> None:
        merged = solve(
            [(turn(6, 0)[:, i : i + 1], torch.eye(1, 4).double()) for i in (0, 1)], "model_stock"
        )
        assert float(merged.norm()) < 1e-15

    def test_experts_that_point_apart_leave_the_base(self) -> None:
        (up, down), *_ = experts = distinct(6, 5, 2, 2)
        other = (-up + 0.1 * experts[1][0], down)
        assert not solve([(up, down), other], "model_stock").any()

    def test_is_the_foot_of_the_perpendicular_from_the_center(self) -> None:
        """Experts on a shell around a center µ: of their plane with the base, nearest to µ."""
        *axes, center = turn(30, 3).T[:4]
        updates = [0.7 * center + axis for axis in axes]
        plane = torch.stack(updates, dim=1)
        foot = plane @ torch.linalg.lstsq(plane, 0.7 * center.unsqueeze(1)).solution.squeeze(1)
        stack = DenseStack(torch.stack(updates).view(1, 3, 5, 6))
        assert_close(update(merge(stack, "model_stock")).flatten(), foot)

    @pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (2, 3, 4)])
    def test_takes_tensors_of_any_shape(self, shape: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(0)
        updates = [1 + torch.rand(shape, generator=generator).double() for _ in range(3)]
        merged = update(merge(DenseStack(torch.stack(updates).unsqueeze(0)), "model_stock"))
        assert_close(merged, reference.model_stock(updates, [1.0] * 3))

    def test_weights_count_as_experts_do(self) -> None:
        """Equal weights of any size are the paper's N; a small one is an expert half left out."""
        experts = distinct(6, 5, 2, 3)
        shared = [(up + 3, down + 3) for up, down in experts]
        assert_close(
            solve(shared, "model_stock", [2.0] * 3), solve(shared, "model_stock", [1.0] * 3)
        )
        nearly = solve(shared, "model_stock", [1.0, 1.0, 1e-9])
        assert_close(nearly, solve(shared[:2], "model_stock"), 1e-8)


class TestKnots:
    @pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 1)])
    def test_is_ties_in_the_joint_basis(self, shape: tuple[int, int]) -> None:
        """Turned into the joint basis by hand, experts merge as TIES merges their entries."""
        experts = distinct(*shape, 2, 3)
        basis = torch.linalg.svd(torch.cat(products(experts), dim=1), full_matrices=False).U
        basis = basis[
            :, : min(shape[0], sum(torch.linalg.matrix_rank(a) for a in products(experts)))
        ]
        turned = torch.stack([basis.T @ a for a in products(experts)]).unsqueeze(0)
        inside = update(merge(DenseStack(turned), "ties", keep=KEEP))
        assert_close(solve(experts, "knots_ties"), basis @ inside)

    def test_of_one_row_is_ties(self) -> None:
        experts = distinct(1, 30, 1, 4)
        assert_close(solve(experts, "knots_ties"), update(merge(dense(experts), "ties", keep=KEEP)))

    def test_a_weight_of_two_is_the_expert_twice(self) -> None:
        experts = distinct(12, 7, 2, 3)
        twice = solve([experts[0], *experts], "knots_ties")
        assert_close(twice, solve(experts, "knots_ties", [2.0, 1.0, 1.0]))

    @pytest.mark.parametrize("count", [1, 3])
    def test_identical_experts_with_all_kept_are_themselves(self, count: int) -> None:
        experts = distinct(12, 7, 2, 1) * count
        merged = update(merge(factors(experts), "knots_ties", keep=1.0))
        assert_close(merged, products(experts)[0])


class TestTsv:
    @pytest.mark.parametrize("shape", [(12, 7), (7, 12), (8, 8)])
    def test_directions_are_orthonormal(self, shape: tuple[int, int]) -> None:
        """Then the singular values of the merge are those that the experts keep."""
        updates, kept = products(distinct(*shape, 6, 3)), min(shape) // 3
        leading = [torch.linalg.svdvals(a)[:kept] for a in updates]
        merged = update(merge(DenseStack(torch.stack(updates).unsqueeze(0)), "tsv_m"))
        sizes = torch.linalg.svdvals(merged)
        assert_close(sizes[: 3 * kept], torch.cat(leading).sort(descending=True).values)
        assert float(sizes[3 * kept :].sum()) < 1e-12 * float(sizes[0])

    def test_orthogonalised_columns_are_the_nearest_orthonormal_ones(self) -> None:
        columns = pair(9, 4, 1, seed=0)[0]
        nearest = orthogonalised(columns)
        assert_close(nearest.T @ nearest, torch.eye(4, dtype=torch.float64))
        far = [distance(turn(9, seed)[:, :4], columns) for seed in range(50)]
        assert distance(nearest, columns) < min(far)
        assert_close(nearest.T @ columns, (nearest.T @ columns).T)  # polar: the rest is symmetric

    def test_one_expert_is_itself(self) -> None:
        experts = distinct(9, 7, 7, 1)
        assert_close(solve(experts, "tsv_m"), products(experts)[0])

    def test_identical_experts_are_what_each_keeps(self) -> None:
        experts = distinct(9, 8, 8, 1)
        left, sizes, right = torch.linalg.svd(products(experts)[0], full_matrices=False)
        kept = left[:, :2] @ torch.diag(sizes[:2]) @ right[:2]
        assert_close(solve(experts * 4, "tsv_m"), kept)

    def test_experts_that_do_not_meet_are_added(self) -> None:
        left, right = turn(12, 1).split(3, dim=1), turn(9, 2).split(3, dim=1)
        experts = [(left[i], pair(3, 3, 3, i)[0] @ right[i].T) for i in range(3)]
        assert_close(solve(experts, "tsv_m"), sum(products(experts)))


class TestIso:
    @pytest.mark.parametrize("shape", [(12, 7), (7, 12), (8, 8)])
    @pytest.mark.parametrize("rank", [2, 8])
    def test_the_spectrum_is_flat_and_the_spaces_are_those_of_the_sum(
        self, shape: tuple[int, int], rank: int
    ) -> None:
        experts = distinct(*shape, rank, 2)
        total, merged = sum(products(experts)), solve(experts, "iso_c")
        spread = min(*shape, 2 * rank)
        sizes = torch.linalg.svdvals(merged)[:spread]
        assert_close(sizes, torch.linalg.svdvals(total)[:spread].mean().expand(spread))
        assert_close(merged.T @ total, total.T @ merged, SAME)
        assert_close(merged @ total.T, total @ merged.T, SAME)
        assert torch.linalg.matrix_rank(torch.cat([merged, total], dim=0)) == spread

    def test_weights_are_those_of_task_arithmetic(self) -> None:
        experts = distinct(9, 7, 7, 3)
        added = update(merge(dense(experts), "task_arithmetic", [1.0, 0.5, 2.0]))
        once = update(merge(DenseStack(added[None, None]), "iso_c"))
        assert_close(solve(experts, "iso_c", [1.0, 0.5, 2.0]), once)


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
