"""Laws of Model Stock, KnOTS, TSV-M and Iso-C, each its own."""

import pytest
import torch

from poemerge.spectrum import orthogonalised
from poemerge.task_vector import DenseStack
from tests import reference
from tests.core.baselines import KEEP, SAME, solve, turn
from tests.core.stacks import assert_close, dense, distance, factors, merge, pair, update
from tests.core.stacks import product as products
from tests.core.test_certificates import distinct


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
