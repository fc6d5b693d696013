"""Golden values: one tiny merge by every method, so that no release changes a result unnoticed.

The inputs are explicit arithmetic, and the values of tests/reference.py where it knows the method.
A processor may round otherwise: hence the tolerance.
"""

import pytest
import torch
from torch import Tensor

from poemerge.method import METHODS, Call
from poemerge.task_vector import DenseStack, LowRankStack
from tests import reference
from tests.core.stacks import assert_close
from tests.reference_family import product

ROWS, RANK, COLUMNS, EXPERTS = 6, 2, 4, 3
WEIGHTS = (1.0, 0.5, 2.0)
SEEDS = ((11, 12, 13),)
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}  # relative, of the first row and the norm


def waves(rows: int, columns: int, phase: float) -> Tensor:
    count = torch.arange(1.0, rows * columns + 1, dtype=torch.float64).view(rows, columns)
    return torch.cos(phase * count + 0.1 * count * count)


FACTORS = [
    (waves(ROWS, RANK, 0.3 + i), (1 + i) / 2 * waves(RANK, COLUMNS, 1.1 * i + 0.2))
    for i in range(EXPERTS)
]
UPDATES = [up @ down for up, down in FACTORS]
FISHERS = [1.2 + waves(ROWS, COLUMNS, 2.0 + i) for i in range(EXPERTS)]
SEEN = [waves(COLUMNS + 2, COLUMNS, 3.0 + i) for i in range(EXPERTS)]
ACTIVATIONS = [x.T @ x for x in SEEN]
GIVEN = {"diagonal": FISHERS, "activation": ACTIVATIONS}

# (method, settings): norm of the merged update, and its first row
GOLDEN: dict[tuple[str, tuple[tuple[str, object], ...]], tuple[float, list[float]]] = {
    ("average", ()): (1.75539531, [0.606476067, -0.116840019, -0.00970504817, 0.0667720266]),
    ("task_arithmetic", ()): (6.1438836, [2.12266623, -0.408940068, -0.0339676686, 0.233702093]),
    ("ties", (("keep", 0.4),)): (3.05974394, [0.774275799, 0.344492638, 0, -0.378899296]),
    ("dare_ties", (("drop", 0.3), ("keep", 0.8))): (
        3.48976178,
        [1.3298585, -0.338945075, -0.192375583, 0.862624789],
    ),
    ("model_stock", ()): (
        0.510588486,
        [0.176404536, -0.0339850335, -0.00282288885, 0.019421852],
    ),
    ("knots_ties", (("keep", 0.3),)): (
        2.96123739,
        [0.64043187, -0.213412975, -0.0234906565, 0.139211699],
    ),
    ("tsv_m", ()): (4.3584468, [0.469882425, -0.424758191, 0.0787963657, 0.180786183]),
    ("iso_c", ()): (4.91900822, [1.4419073, 0.601012015, 0.806708808, 0.376931098]),
    ("gaussian_poe", ()): (3.7360329, [0.886987666, 0.0474653216, 0.821361471, 0.994635761]),
    ("gaussian_poe", (("side", "output"),)): (
        4.22471235,
        [0.417448013, 0.138806436, 0.343157528, -0.451564055],
    ),
    ("gaussian_poe", (("precision", "identity"),)): (
        1.70426729,
        [0.588811715, -0.113436912, -0.00942237687, 0.0648272102],
    ),
    ("gaussian_poe", (("precision", "diagonal"),)): (
        1.57516401,
        [0.522945277, -0.179726293, -0.000218940664, 0.213624061],
    ),
    ("gaussian_poe", (("precision", "activation"),)): (
        1.73974395,
        [0.619183271, -0.121424459, -0.207736898, 0.202525438],
    ),
    ("gaussian_poe", (("balance", "norm"),)): (
        3.95206002,
        [0.955252993, 0.210189573, 0.97063806, 1.04484743],
    ),
    ("cauchy_poe", ()): (4.9638091, [1.07536389, 0.636147636, 1.31066631, 1.19103335]),
    ("cauchy_poe", (("side", "output"), ("scale", "paper"), ("ridge_mode", "absolute"))): (
        5.15022416,
        [-0.137753935, 0.741878457, 0.590478621, -1.01906923],
    ),
    ("cauchy_poe", (("precision", "identity"), ("epsilon", 1.0))): (
        1.72373187,
        [0.561765914, -0.0752782013, 0.00613261298, 0.0213122861],
    ),
    ("cauchy_poe", (("scale", "estimated"), ("epsilon", 1.0))): (
        5.07029649,
        [1.08218901, 0.661508871, 1.330379, 1.20045093],
    ),
    ("student_t_poe", ()): (4.63184101, [1.05280559, 0.539653314, 1.24146739, 1.16299758]),
    ("student_t_poe", (("nu", "estimated"), ("scale", "estimated"), ("epsilon", 1.0))): (
        4.09011089,
        [0.974720632, 0.339178755, 1.03992654, 1.03040216],
    ),
}


KNOWN = [row for row in GOLDEN if row[0] != "dare_ties"]  # whose draw is torch's own


def merge(method: str, settings: dict[str, object], stack: object) -> Tensor:
    found = METHODS[method]
    given = GIVEN.get(found.settings.parse(settings).precision) if "poe" in method else None
    curvature = None if given is None else torch.stack(given).unsqueeze(0)
    call = Call(torch.tensor([WEIGHTS], dtype=torch.float64), SEEDS, curvature)
    return found.merge(stack, found.settings.parse(settings), call).update.dense()[0]


def dense(dtype: torch.dtype) -> DenseStack:
    return DenseStack(torch.stack(UPDATES).unsqueeze(0).to(dtype))


def low_rank(dtype: torch.dtype) -> LowRankStack:
    ups, downs = zip(*FACTORS, strict=True)
    return LowRankStack(*(tuple(f.unsqueeze(0).to(dtype) for f in side) for side in (ups, downs)))


@pytest.mark.parametrize("stack", [dense, low_rank])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "row", GOLDEN, ids=lambda row: "-".join([row[0], *(str(v) for _, v in row[1])])
)
def test_value(row: tuple, dtype: torch.dtype, stack: object) -> None:
    method, settings = row
    norm, first = GOLDEN[row]
    merged = merge(method, dict(settings), stack(dtype)).double()
    assert float(merged.norm()) == pytest.approx(norm, rel=TOLERANCE[dtype])
    assert_close(merged[0], torch.tensor(first, dtype=torch.float64), TOLERANCE[dtype])


def test_every_method_has_a_value() -> None:
    assert {method for method, _ in GOLDEN} == METHODS.keys()


@pytest.mark.parametrize(
    "row", KNOWN, ids=lambda row: "-".join([row[0], *(str(v) for _, v in row[1])])
)
def test_values_are_those_of_the_reference(row: tuple) -> None:
    """Or a golden value would only say that a mistake has not changed."""
    method, settings = row[0], dict(row[1])
    if method.endswith("_poe"):
        precision = settings.get("precision", "gram")
        side = settings.get("side", "input")
        options = {"ridge": 0.03, **settings}
        own = {k: v for k, v in options.items() if k not in {"precision", "side"}}
        tail = method.removesuffix("_poe")
        form = product(UPDATES, WEIGHTS, precision, side, GIVEN.get(precision), tail=tail, **own)
        expected = form.solve().view(ROWS, COLUMNS)
    else:
        expected = getattr(reference, method)(UPDATES, WEIGHTS, **settings)
    norm, first = GOLDEN[row]
    assert float(expected.norm()) == pytest.approx(norm, rel=1e-6)
    assert_close(expected[0], torch.tensor(first, dtype=torch.float64), 1e-6)
