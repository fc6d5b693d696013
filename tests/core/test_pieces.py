"""Matrices in pieces: each has weights of its own, and is what the reference solves by itself."""

import itertools
import json

import pytest
import torch
from torch import Tensor

from poemerge.method import Call, Cut
from poemerge.methods import find
from poemerge.task_vector import DenseStack
from poemerge.update import LowRank
from tests.core.stacks import assert_close, dense, distance, factors, merge, pair, update
from tests.core.stacks import product as products
from tests.reference_family import product

ROWS, COLUMNS = 10, 6
EXPERTS = [pair(ROWS, 3, COLUMNS, seed) for seed in range(3)]
UPDATES = products(EXPERTS)
WEIGHTS = (1.0, 0.5, 2.0)
TWINS = {"dense": dense, "factors": factors}
TAILS = {"gaussian": {}, "cauchy": {"epsilon": 0.5}}
SETTLED = {"gaussian": {}, "cauchy": {"max_steps": 400, "rtol": 1e-11}}
SLOW = 1e-7  # what plain reweighting, stopped at 1e-12 a step, may still be off
CUTS = {
    "rows": Cut("rows", (5, 5)),
    "unequal rows": Cut("rows", (4, 4, 2)),
    "columns": Cut("columns", (2, 2, 2)),
    "unequal columns": Cut("columns", (4, 2)),
    "fused": Cut("rows", (5, 3, 2), apart=True),
    "fused and equal": Cut("rows", (5, 5), apart=True),
}
PRECISIONS = ("identity", "diagonal", "gram", "activation")


def sheet(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


SEEN = [sheet(9, COLUMNS, seed=20 + i) for i in range(3)]
GIVEN = {
    "diagonal": [sheet(ROWS, COLUMNS, seed=10 + i).square() for i in range(3)],
    "activation": [x.T @ x for x in SEEN],
}


def by_hand(precision: str, side: str, tail: str, cut: Cut) -> Tensor:
    """Every piece solved by the reference; fused ones as experts of their own."""
    merged, given = torch.zeros(ROWS, COLUMNS).double(), GIVEN.get(precision)
    options = {"tail": tail, "ridge": 0.05, **TAILS[tail]}
    start = 0
    for size in cut.sizes:
        own = slice(start, start + size)
        start += size
        if cut.apart:
            parts = [a[own] for a in UPDATES]
            blocks = [c[own] for c in given] if precision == "diagonal" else given
            found = product(parts, WEIGHTS, precision, side, blocks, **options)
            merged[own] = found.solve().view(size, COLUMNS)
            continue
        mask = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
        mask[own if cut.axis == "rows" else (slice(None), own)] = True
        found = product(UPDATES, WEIGHTS, precision, side, given, entries=mask, **options)
        merged[mask] = found.solve()
    return merged


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tail", TAILS)
def test_pieces_are_those_solved_by_hand(
    precision: str, side: str, tail: str, cut: str, twin: str
) -> None:
    options = {"precision": precision, "side": side, "ridge": 0.05, **TAILS[tail], **SETTLED[tail]}
    given = GIVEN.get(precision)
    stack = TWINS[twin](EXPERTS)
    merged = merge(stack, f"{tail}_poe", WEIGHTS, given=given, cut=CUTS[cut], **options)
    assert_close(update(merged), by_hand(precision, side, tail, CUTS[cut]), SLOW)
    (certificate,) = merged.certificates
    assert certificate["pieces"] == len(CUTS[cut].sizes)
    assert sum(certificate["weights"]) == pytest.approx(1)
    energies = certificate["energies"]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(energies))
    json.dumps(certificate, allow_nan=False)


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("side", ["output", "input"])
class TestRowBlocks:
    """`granularity: rows` cuts whatever comes, without a plan."""

    def solve(self, twin: str, precision: str, side: str, **options: object) -> Tensor:
        given = GIVEN.get(precision)
        settings = {"precision": precision, "side": side, "ridge": 0.05, "epsilon": 0.5}
        settings |= SETTLED["cauchy"] | options
        merged = merge(TWINS[twin](EXPERTS), "cauchy_poe", WEIGHTS, given=given, **settings)
        return update(merged)

    def test_are_the_pieces(self, twin: str, precision: str, side: str) -> None:
        actual = self.solve(twin, precision, side, granularity="rows", block_rows=4)
        assert_close(actual, by_hand(precision, side, "cauchy", CUTS["unequal rows"]), SLOW)

    def test_one_block_is_the_matrix(self, twin: str, precision: str, side: str) -> None:
        actual = self.solve(twin, precision, side, granularity="rows", block_rows=ROWS)
        assert_close(actual, self.solve(twin, precision, side))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_batch_in_pieces_is_its_matrices_in_pieces(precision: str) -> None:
    """Pieces and matrices share an axis in the solver; none may take another's place."""
    batch = [[pair(ROWS, 3, COLUMNS, seed + 10 * b) for seed in range(3)] for b in range(3)]
    given = torch.stack([torch.stack(GIVEN[precision])] * 3) if precision in GIVEN else None
    if given is not None:
        given = given * torch.tensor([1.0, 2.0, 5.0]).view(3, 1, 1, 1)
    for side, cut in itertools.product(("output", "input"), CUTS.values()):
        settings = find("cauchy_poe").settings.parse({"precision": precision, "side": side})
        say = torch.tensor([[1.0, 1.0, 2.0], [1.0, 0.0, 1.0], [3.0, 1.0, 1.0]]).double()
        stack = DenseStack(torch.cat([dense(experts).deltas for experts in batch]))
        together = find("cauchy_poe").merge(stack, settings, Call(say, curvature=given, cut=cut))
        for index, experts in enumerate(batch):
            own = slice(index, index + 1)
            part = None if given is None else given[own]
            call = Call(say[own], curvature=part, cut=cut)
            alone = find("cauchy_poe").merge(dense(experts), settings, call)
            assert_close(together.update.dense()[index], update(alone))
            assert together.certificates[index]["weights"] == pytest.approx(
                alone.certificates[0]["weights"]
            )


def test_the_input_side_shares_its_gram() -> None:
    """Weights alone are cut: a Gaussian has none that depend on M, so pieces change nothing."""
    settings = {"side": "input", "ridge": 0.05, "ridge_mode": "absolute"}
    whole = update(merge(dense(EXPERTS), "gaussian_poe", WEIGHTS, **settings))
    for cut in (CUTS["rows"], CUTS["unequal rows"]):
        pieces = merge(dense(EXPERTS), "gaussian_poe", WEIGHTS, cut=cut, **settings)
        assert_close(update(pieces), whole)
    fused = merge(dense(EXPERTS), "gaussian_poe", WEIGHTS, cut=CUTS["fused"], **settings)
    assert distance(update(fused), whole) > 0.01
    cauchy = {"side": "input", "epsilon": 0.5}
    cut = update(merge(dense(EXPERTS), "cauchy_poe", WEIGHTS, cut=CUTS["rows"], **cauchy))
    assert distance(cut, update(merge(dense(EXPERTS), "cauchy_poe", WEIGHTS, **cauchy))) > 0.01


def test_a_piece_that_no_expert_changes_stays() -> None:
    idle = [a.clone() for a in UPDATES]
    for a in idle:
        a[4:8] = 0
    stack = DenseStack(torch.stack(idle).unsqueeze(0))
    for side, cut in itertools.product(("output", "input"), ("unequal rows", "fused")):
        merged = merge(stack, "cauchy_poe", cut=CUTS[cut], side=side)
        touched = update(merged).abs().sum(dim=-1) > 0
        assert touched.tolist() == [True] * 4 + [False] * 4 + [True] * 2
        assert sum(merged.certificates[0]["weights"]) == pytest.approx(1)


def test_square_blocks_are_of_tall_dense_matrices() -> None:
    tall = [pair(12, 3, 4, seed) for seed in range(3)]
    cut = Cut("rows", (4, 4, 4))
    square = merge(dense(tall), "cauchy_poe", granularity="square", side="output")
    assert_close(update(square), update(merge(dense(tall), "cauchy_poe", cut=cut, side="output")))
    whole = update(merge(dense(tall), "cauchy_poe", side="output"))
    assert distance(update(square), whole) > 0.01
    low = merge(factors(tall), "cauchy_poe", granularity="square", side="output")
    assert_close(update(low), whole)
    other = [pair(11, 3, 4, seed) for seed in range(3)]
    uneven = merge(dense(other), "cauchy_poe", granularity="square", side="output")
    assert uneven.certificates[0]["pieces"] == 1


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_pieces_stay_in_factors_where_the_settings_promise_it(precision: str, side: str) -> None:
    stack = factors([pair(ROWS, 1, COLUMNS, seed) for seed in range(3)])
    settings = {"precision": precision, "side": side, "granularity": "rows", "block_rows": 4}
    promised = find("cauchy_poe").factors(find("cauchy_poe").settings.parse(settings))
    assert promised == (precision in {"identity", "gram"})
    merged = merge(stack, "cauchy_poe", given=GIVEN.get(precision), **settings).update
    assert isinstance(merged, LowRank) == promised
    assert not promised or merged.rank <= 3
    for cut in CUTS.values():
        if promised:
            options = {"precision": precision, "side": side, "cut": cut}
            assert isinstance(merge(stack, "cauchy_poe", **options).update, LowRank)
