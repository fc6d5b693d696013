"""Entries of residuals: drawn as they are, whatever form the updates have."""

import pytest
import torch

from poemerge.residuals.sampling import COLUMNS, ROWS, draw_entries, residual_block, rounding_of
from poemerge.update import Dense, LowRank, Update
from tests.core.stacks import assert_close, pair, product

ALL = 10**6  # more entries than a tiny matrix has


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestSampling:
    A, M = pair(12, 3, 7, seed=1), pair(12, 5, 7, seed=2)

    def kinds(self) -> list[tuple[Update, Update]]:
        (a, m), (full_a, full_m) = (self.A, self.M), product([self.A, self.M])
        return [(u, v) for u in (LowRank(*a), Dense(full_a)) for v in (LowRank(*m), Dense(full_m))]

    def test_factors_give_what_their_dense_twins_give(self) -> None:
        update, merged = product([self.A, self.M])
        expected = update.T @ (merged - update)
        rows, columns = torch.tensor([6, 0, 3]), torch.tensor([5, 1])
        for kind in self.kinds():
            assert_close(residual_block(*kind, torch.arange(7), torch.arange(7)), expected)
            assert_close(residual_block(*kind, rows, columns), expected[rows][:, columns])
            values, noise = draw_entries(*kind, 20, 1e-3, generator()) or pytest.fail("none")
            first, first_noise = draw_entries(*self.kinds()[0], 20, 1e-3, generator()) or (0, 0)
            assert_close(values, first)
            assert noise == pytest.approx(first_noise)

    def test_the_input_side_is_the_output_side_of_the_transposes(self) -> None:
        update, merged = product([self.A, self.M])
        expected = (merged - update) @ update.T
        for a, m in self.kinds():
            assert_close(residual_block(a.mT, m.mT, torch.arange(12), torch.arange(12)).T, expected)

    def test_entries_are_in_units_of_doing_nothing(self) -> None:
        for kind, _ in self.kinds():
            nothing = LowRank.zero(12, 7)
            values, _ = draw_entries(kind, nothing, ALL, 0.0, generator()) or pytest.fail("none")
            assert len(values) == 7 * 7
            assert float(values.square().mean()) == pytest.approx(1)

    def test_an_expert_without_directions_has_no_residual(self) -> None:
        merged = Dense(product([self.M])[0])
        for update in (Dense(torch.zeros(12, 7)), LowRank.zero(12, 7)):
            assert draw_entries(update, merged, 10, 0.0, generator()) is None

    def test_a_wide_matrix_is_drawn_from_everywhere_alike(self) -> None:
        side = COLUMNS + 500
        place = torch.arange(side, dtype=torch.float64)
        # A = (1, row), M - A = (column, 0): entry (i, j) of the residual is column j.
        update = LowRank(torch.eye(2).double(), torch.stack([torch.ones_like(place), place]))
        shift = torch.stack([place, torch.zeros_like(place)])
        merged = LowRank(torch.eye(2).double(), update.down + shift)
        for turned in (False, True):
            rows, columns = torch.arange(3), torch.tensor([0, 7, side - 1])
            block = residual_block(update, merged, rows, columns)
            assert_close(block, place[columns].expand(3, 3))
            drawn = draw_entries(update, merged, 30_000, 0.0, generator(int(turned)))
            values = (drawn or pytest.fail("none"))[0]
            values = values / values.max() * (side - 1)
            assert len(values) == 30_000
            assert len(values.round().unique()) > 0.99 * COLUMNS
            assert float(values.mean()) == pytest.approx(side / 2, rel=0.03)
        assert side > ROWS

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_rounding_is_what_storing_costs(self, dtype: torch.dtype) -> None:
        """Between half of the bound and the bound, in entries of M and of residuals."""
        start = torch.randn(80, 60, generator=generator(3))
        small = [(0.01 * up, down) for up, down in (pair(80, 4, 60, 4), pair(80, 4, 60, 5))]
        update, merged = (u.float() for u in product(small))
        stored = (start + merged).to(dtype).float() - start
        bound = rounding_of(Dense(merged), start, dtype)
        found = float((stored - merged).square().mean().sqrt())
        assert bound / 2 < found < bound
        exact, noise = draw_entries(Dense(update), Dense(merged), ALL, bound, generator()) or (0, 0)
        rounded, _ = draw_entries(Dense(update), Dense(stored), ALL, bound, generator()) or (0, 0)
        assert noise / 2 < float((rounded - exact).square().mean().sqrt()) < noise

    def test_rounding_of_factors(self) -> None:
        up, down = (factor.float() for factor in self.A)
        bound = rounding_of(LowRank(up, down), torch.zeros(12, 7), torch.bfloat16)
        moved = up.bfloat16().float() @ down.bfloat16().float() - up @ down
        assert bound / 2.5 < float(moved.square().mean().sqrt()) < bound
