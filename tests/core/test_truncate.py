"""Truncation against torch's own SVD in fp64: the best there is, and an error that is true."""

import pytest
import torch
from torch import Tensor

from poemerge import truncate
from poemerge.errors import SettingError
from poemerge.truncate import best_rank, relative_error
from poemerge.update import Dense, LowRank, Update

SHAPES = [(40, 24), (24, 40), (32, 32), (1, 30), (30, 1), (1, 1)]
RANKS = [1, 3, 10]
WIDE = 120  # beyond which the sketches of these tests are narrower than the matrix


def matrix(rows: int, columns: int, decay: float = 1.0, seed: int = 0) -> Tensor:
    """Random singular vectors, singular values 1 / i^decay."""
    generator = torch.Generator().manual_seed(seed)
    side = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(n, side, generator=generator, dtype=torch.float64))[0]
        for n in (rows, columns)
    )
    return left * torch.arange(1, side + 1, dtype=torch.float64) ** -decay @ right.mT


def optimum(dense: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Eckart–Young by torch.linalg.svd: the approximation and its relative error."""
    u, s, vh = torch.linalg.svd(dense.double(), full_matrices=False)
    best = u[..., :rank] * s[..., None, :rank] @ vh[..., :rank, :]
    return best, torch.linalg.norm(s[..., rank:], dim=-1) / torch.linalg.norm(s, dim=-1)


def factored(rows: int, columns: int, rank: int = 12) -> LowRank:
    """An update in factors whose norms differ by a factor of a thousand."""
    generator = torch.Generator().manual_seed(1)
    up = 1e3 * torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    return LowRank(up, torch.randn(rank, columns, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["dense", "factors"])
def test_eckart_young(kind: str, shape: tuple[int, int], rank: int) -> None:
    update: Update = Dense(matrix(*shape)) if kind == "dense" else factored(*shape)
    best, least = optimum(update.dense(), rank)
    factors, error = best_rank(update, rank, svd="exact")
    assert factors.rank <= rank
    torch.testing.assert_close(factors.dense(), best, rtol=1e-9, atol=1e-9 * float(best.norm()))
    torch.testing.assert_close(error, least, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_factors_and_their_dense_twin_agree(rank: int) -> None:
    update = factored(40, 30)
    ours, error = best_rank(update, rank)
    twin, twin_error = best_rank(Dense(update.dense()), rank)
    torch.testing.assert_close(ours.dense(), twin.dense(), rtol=0, atol=1e-9)
    torch.testing.assert_close(error, twin_error, rtol=1e-9, atol=0)


@pytest.mark.parametrize("rank", [24, 25, 1000])
@pytest.mark.parametrize("svd", truncate.SVD)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_full_rank_is_the_update_itself(shape: tuple[int, int], svd: str, rank: int) -> None:
    delta = matrix(*shape).float()
    factors, error = best_rank(Dense(delta), rank, svd=svd)
    assert torch.equal(factors.dense(), delta)
    assert factors.rank == 24
    assert error == 0


def test_factors_of_low_rank_come_back_as_they_are() -> None:
    update = factored(40, 30)
    factors, error = best_rank(update, 12)
    assert factors is update
    assert error == 0
    small, error = best_rank(factored(5, 30), 8)  # 12 columns, but rank 5
    assert small.rank == 5
    torch.testing.assert_close(small.dense(), factored(5, 30).dense())
    assert error < 1e-15


@pytest.mark.parametrize("shape", [(200, 150), (150, 200)])
@pytest.mark.parametrize("decay", [0.3, 1.0, 3.0])
def test_randomised_is_nearly_the_best(shape: tuple[int, int], decay: float) -> None:
    delta = matrix(*shape, decay=decay).float()
    _, least = optimum(delta, 16)
    factors, error = best_rank(Dense(delta), 16, svd="randomised")
    assert factors.up.dtype == torch.float32
    assert least * (1 - 1e-5) <= error <= least * 1.02


def test_randomised_is_seeded() -> None:
    update = Dense(matrix(WIDE, WIDE).float())
    once, again, other = (best_rank(update, 8, svd="randomised", seed=s)[0] for s in (3, 3, 4))
    assert torch.equal(once.up, again.up)
    assert torch.equal(once.down, again.down)
    assert not torch.equal(once.up, other.up)


def test_auto_is_exact_where_that_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    update = Dense(matrix(WIDE, WIDE))
    exact, sketched = (best_rank(update, 8, svd=s)[0] for s in ("exact", "randomised"))
    assert torch.equal(best_rank(update, 8)[0].up, exact.up)
    monkeypatch.setattr(truncate, "EXACT_SIDE", WIDE - 1)
    assert torch.equal(best_rank(update, 8)[0].up, sketched.up)


@pytest.mark.parametrize("svd", truncate.SVD)
def test_zero_stays_zero(svd: str) -> None:
    for update in (Dense(torch.zeros(WIDE, WIDE)), LowRank.zero(9, 7), factored(9, 7).scaled(0)):
        factors, error = best_rank(update, 3, svd=svd)
        assert not factors.dense().any()
        assert error == 0


@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_a_batch_is_its_parts(svd: str) -> None:
    parts = [matrix(WIDE, WIDE + 9, seed=s) for s in range(6)]
    batch = Dense(torch.stack(parts).reshape(2, 3, WIDE, WIDE + 9))
    factors, errors = best_rank(batch, 5, svd=svd)
    assert errors.shape == (2, 3)
    for index, part in enumerate(parts):
        alone, error = best_rank(Dense(part), 5, svd=svd)
        torch.testing.assert_close(factors.dense().flatten(0, 1)[index], alone.dense())
        torch.testing.assert_close(errors.flatten()[index], error)


def test_a_batch_of_factors_is_its_parts() -> None:
    one, two = factored(20, 30), factored(20, 30).scaled(-2)
    batch = LowRank(torch.stack([one.up, two.up]), torch.stack([one.down, two.down]))
    factors, errors = best_rank(batch, 5)
    for index, part in enumerate((one, two)):
        alone, error = best_rank(part, 5)
        torch.testing.assert_close(factors.part(index).dense(), alone.dense())
        torch.testing.assert_close(errors[index], error)


def test_singular_values_are_split_evenly() -> None:
    factors, _ = best_rank(Dense(matrix(50, 30)), 4)
    sizes = 1 / torch.arange(1, 5, dtype=torch.float64)
    torch.testing.assert_close(factors.up.mT @ factors.up, torch.diag(sizes))
    torch.testing.assert_close(factors.down @ factors.down.mT, torch.diag(sizes))


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    update = Dense(matrix(40, 24))
    whole, error = best_rank(update, 5)
    monkeypatch.setattr(truncate, "BLOCK", 24 * 7)
    blocked, same = best_rank(update, 5)
    torch.testing.assert_close(whole.dense(), blocked.dense())
    torch.testing.assert_close(error, same)


@pytest.mark.parametrize("size", [1e-6, 1e-9, 1e-12])
def test_small_errors_are_true(size: float) -> None:
    """A difference of squares would show nothing below 1e-8."""
    large, small = factored(40, 30, 3), factored(40, 30, 6)
    small = LowRank(small.up[:, 3:] * size, small.down[3:])
    missed = float(torch.linalg.norm(small.dense()) / torch.linalg.norm(large.dense()))
    both = LowRank(torch.cat([large.up, small.up], -1), torch.cat([large.down, small.down], -2))
    assert float(relative_error(both, large)) == pytest.approx(missed, rel=1e-3)
    assert float(relative_error(Dense(both.dense()), large)) == pytest.approx(missed, rel=1e-2)


def test_what_is_refused() -> None:
    update = Dense(matrix(4, 4))
    with pytest.raises(SettingError, match="rank is 0; choose 1 or more"):
        best_rank(update, 0)
    with pytest.raises(SettingError, match=r"svd is 'fast'; choose auto, exact, randomised"):
        best_rank(update, 2, svd="fast")
