"""Laws over all of the family, on inputs that nobody chose: shapes, counts, degenerate kinds."""

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from poemerge.task_vector import DenseStack
from tests.core.stacks import Pair, assert_close, dense, distance, factors, merge, update
from tests.core.stacks import product as products
from tests.core.test_certificates import KINDS, SHAPES, TWINS, identical, one_huge, one_idle
from tests.reference_family import Product, product

TAILS = ("gaussian", "cauchy", "student_t")
PRECISIONS = ("identity", "diagonal", "gram", "activation")
SETTLED = {"max_steps": 500, "rtol": 1e-9}
STATIONARY = 1e-6  # ||H M - b|| / ||b||, of weights that are off by `rtol` or by rounding
SAME = 1e-5  # distance of two solves of one mode; near a saddle the weights barely hold it

COARSE = 1e-3  # where fp32 is on the way, at the conditions that occur here


def sheet(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def curvature(precision: str, rows: int, columns: int, count: int) -> list[Tensor] | None:
    if precision == "diagonal":
        return [sheet(rows, columns, seed=90 + i).square() for i in range(count)]
    if precision == "activation":
        seen = [sheet(columns + 2, columns, seed=90 + i) for i in range(count)]
        return [x.T @ x for x in seen]
    return None


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    """Experts, their curvature and say, and the settings of a product of them."""
    precision, tail = draw(st.sampled_from(PRECISIONS)), draw(st.sampled_from(TAILS))
    rows, columns = draw(st.sampled_from(SHAPES))
    count, kind = draw(st.sampled_from((1, 2, 9))), draw(st.sampled_from(KINDS))
    options = {
        "ridge": draw(st.sampled_from((1e-3, 0.03, 1.0))),
        "ridge_mode": draw(st.sampled_from(("relative", "absolute"))),
    }
    if tail != "gaussian":
        options["scale"] = draw(st.sampled_from(("equivariant", "paper", "estimated")))
        options["epsilon"] = draw(st.sampled_from((0.03, 0.3, 3.0)))
    if tail == "student_t":
        options["nu"] = draw(st.sampled_from((0.5, 4.0, "estimated")))
    return {
        "experts": kind(rows, columns, draw(st.sampled_from((1, 3))), count),
        "kind": kind,
        "tail": tail,
        "say": [float(draw(st.sampled_from((0.5, 1.0, 2.0)))) for _ in range(count)],
        "precision": precision,
        "side": draw(st.sampled_from(("output", "input"))),
        "given": curvature(precision, rows, columns, count),
        "options": options,
    }


def solve(twin, case: dict, **changes: object) -> object:  # noqa: ANN001
    """Merge a case; `changes` are other experts, says or curvature, or settings."""
    case = case | {key: value for key, value in changes.items() if key in case}
    rest = {key: value for key, value in changes.items() if key not in case}
    own = {key: case[key] for key in ("given", "precision", "side")} | case["options"]
    settled = {} if case["tail"] == "gaussian" else SETTLED
    return merge(twin(case["experts"]), f"{case['tail']}_poe", case["say"], **own | settled | rest)


def expected(case: dict) -> Product:
    """The same by the reference, in which an expert whose precision is zero has no say."""
    updates = products(case["experts"])
    shown = {"gram": updates, "identity": [torch.ones(1)] * len(updates)}
    shown = shown.get(case["precision"], case["given"])
    say = [w * bool(p.any()) for w, p in zip(case["say"], shown, strict=True)]
    own = (case["precision"], case["side"], case["given"])
    return product(updates, say, *own, tail=case["tail"], **case["options"])


def rounding(merged: Tensor, form: Product) -> float:
    """What an energy in fp64 may be off by: through terms of q_i that cancel."""
    total = 0.0
    weights, each = form.weights(merged), zip(form.updates, form.operators, strict=True)
    for weight, (a, p) in zip(weights, each, strict=True):
        total += weight * float(merged @ p @ merged + 2 * (a @ p @ merged).abs() + a @ p @ a)
    return 1e-15 * total


def assert_mode(merged: Tensor, form: Product) -> None:
    """The reference's mode; or, where there are several, one that is no worse."""
    flat = merged.flatten().double()
    mode = form.solve(steps=300)
    if distance(flat, mode) > SAME:
        assert form.energy(flat) <= form.energy(mode) + 1e-6 * abs(form.energy(mode))


@pytest.mark.parametrize("twin", TWINS)
@settings(max_examples=150)
@given(case=cases())
def test_a_product_is_solved_and_certified(twin: str, case: dict) -> None:
    merged = solve(TWINS[twin], case)
    (certificate,) = merged.certificates
    form = expected(case)
    json.dumps(certificate, allow_nan=False)
    energies = certificate["energies"]
    assert len(energies) == certificate["steps"] + 1
    noise = rounding(update(merged).flatten(), form)
    slack = 1e-12 * max(map(abs, energies)) + noise
    assert all(after - before <= slack for before, after in pairwise(energies))
    if any(form.origin):
        assert sum(certificate["weights"]) == pytest.approx(1)
        energy = form.energy(update(merged).flatten())
        assert energies[-1] == pytest.approx(energy, rel=1e-6, abs=noise)
    assert certificate["converged"]
    assert certificate["residual"] <= STATIONARY
    assert form.miss(update(merged).flatten()) <= STATIONARY
    assert_mode(update(merged), form)


@given(case=cases())
def test_twins_agree(case: dict) -> None:
    one, other = solve(dense, case), solve(factors, case)
    assert_close(update(other), update(one), SAME)


@given(case=cases(), data=st.data())
def test_order_of_experts_does_not_matter(case: dict, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(case["say"]))))
    changes = {key: [case[key][i] for i in order] for key in ("experts", "say")}
    if case["given"] is not None:
        changes["given"] = [case["given"][i] for i in order]
    one, other = solve(dense, case), solve(dense, case, **changes)
    assert_close(update(other), update(one), SAME)


@given(case=cases())
def test_rotated_experts_merge_to_the_rotated_merge(case: dict) -> None:
    """From both sides; the curvature turns with its side, but a diagonal would not stay one."""
    if case["precision"] == "diagonal":
        case = case | {"precision": "gram", "given": None}
    up, down = case["experts"][0]
    left, right = (torch.linalg.qr(sheet(n, n, seed=n)).Q for n in (len(up), down.shape[1]))
    turned: list[Pair] = [(left @ up, down @ right.T) for up, down in case["experts"]]
    given_ = case["given"] and [right @ c @ right.T for c in case["given"]]
    one, other = solve(dense, case), solve(dense, case, experts=turned, given=given_)
    assert_close(update(other), left @ update(one) @ right.T, SAME)


@given(case=cases())
def test_a_second_run_gives_the_same_bytes(case: dict) -> None:
    for twin in TWINS.values():
        one, two = update(solve(twin, case)), update(solve(twin, case))
        assert one.numpy().tobytes() == two.numpy().tobytes()


@given(case=cases())
def test_stored_dtypes_are_solved_alike(case: dict) -> None:
    """Updates in fp32, as they are loaded, against the same numbers in fp64."""
    single = torch.stack(products(case["experts"])).unsqueeze(0).float()
    case = case | {"experts": single}
    small = solve(DenseStack, case)
    exact = solve(lambda deltas: DenseStack(deltas.double()), case)
    experts, (rows, columns) = len(case["say"]), single.shape[-2:]
    is_reduced = experts * min(rows, columns) < max(rows, columns)  # by a basis that is in fp32
    is_coarse = is_reduced or case["precision"] in {"identity", "diagonal"}
    assert is_coarse or update(small).dtype == torch.float64
    assert_close(update(small).double(), update(exact), COARSE if is_coarse else SAME)


def test_kinds_are_what_they_say() -> None:
    """Or the laws above would be about nothing."""
    same = products(identical(8, 8, 3, 2))
    assert torch.equal(same[0], same[1])
    huge = products(one_huge(8, 8, 3, 2))
    assert huge[0].norm() > 20 * huge[1].norm()
    assert not products(one_idle(8, 8, 3, 2))[0].any()
