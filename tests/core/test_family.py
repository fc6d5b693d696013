"""One table, many methods: each row against an implementation of its own, and against files."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from poemerge.merge import merge_checkpoints
from poemerge.poe import solver
from poemerge.report import MergeReport
from poemerge.task_vector import DenseStack
from poemerge.update import LowRank
from tests import reference
from tests.core.stacks import LIMIT, assert_close, dense, distance, factors, merge, pair, update
from tests.core.stacks import product as products
from tests.reference_family import product
from tests.zoo import Zoo

ROWS, COLUMNS = 9, 5
EXPERTS = [pair(ROWS, 3, COLUMNS, seed) for seed in range(4)]
UPDATES = products(EXPERTS)
WEIGHTS = (1.0, 0.5, 2.0, 0.25)
SETTLED = {"max_steps": 400, "rtol": 1e-11}
SLOW = 1e-7  # what plain reweighting, stopped at 1e-12 a step, may still be off
PUBLISHED = 1e-4  # relative, in fp32
TWINS = {"dense": dense, "factors": factors}


def sheet(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


FISHERS = [sheet(ROWS, COLUMNS, seed=10 + i).square() for i in range(4)]
FISHERS[0][0] = 0
INPUTS = [sheet(12, COLUMNS, seed=20 + i) for i in range(4)]
ACTIVATIONS = [x.T @ x for x in INPUTS]
GIVEN = {"diagonal": FISHERS, "activation": ACTIVATIONS}
TAILS = {
    "gaussian": ("gaussian_poe", {}),
    "cauchy": ("cauchy_poe", {}),
    "student-2.5": ("student_t_poe", {"nu": 2.5}),
    "student-estimated": ("student_t_poe", {"nu": "estimated"}),
}


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("precision", ["identity", "diagonal", "gram", "activation"])
def test_every_row_of_the_table(precision: str, side: str, tail: str, twin: str) -> None:
    method, own = TAILS[tail]
    robust = {"scale": ["equivariant", "paper", "estimated"], "epsilon": [0.5]}
    common = {"ridge": [0.05], "ridge_mode": ["relative", "absolute"], "balance": ["none", "norm"]}
    grid = common if tail == "gaussian" else common | robust
    given = GIVEN.get(precision)
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True)) | own
        settled = {} if tail == "gaussian" else SETTLED
        merged = merge(
            TWINS[twin](EXPERTS),
            method,
            WEIGHTS,
            given=given,
            precision=precision,
            side=side,
            **settings | settled,
        )
        name = method.removesuffix("_poe")
        expected = product(UPDATES, WEIGHTS, precision, side, given, tail=name, **settings)
        mode = expected.solve()
        assert_close(update(merged), mode.view(ROWS, COLUMNS), SLOW)
        energies = merged.certificates[0]["energies"]
        assert energies[-1] == pytest.approx(expected.energy(mode), rel=1e-9)
        assert energies[0] == pytest.approx(expected.energy(expected.start()), rel=1e-9)


@pytest.mark.parametrize("twin", TWINS)
class TestSpecialCases:
    """A known method is this code with another row of the table."""

    def test_average(self, twin: str) -> None:
        merged = merge(TWINS[twin](EXPERTS), "gaussian_poe", WEIGHTS, preset="average")
        assert_close(update(merged), reference.average(UPDATES, WEIGHTS))
        assert isinstance(merged.update, LowRank) == (twin == "factors")

    def test_task_arithmetic_is_the_average_but_for_strength(self, twin: str) -> None:
        merged = merge(TWINS[twin](EXPERTS), "gaussian_poe", WEIGHTS, preset="average")
        expected = reference.task_arithmetic(UPDATES, WEIGHTS)
        assert_close(sum(WEIGHTS) * update(merged), expected)

    def test_fisher_merging(self, twin: str) -> None:
        stack = TWINS[twin](EXPERTS)
        merged = merge(stack, "gaussian_poe", WEIGHTS, given=FISHERS, preset="fisher")
        assert_close(update(merged), reference.fisher_merging(UPDATES, WEIGHTS, FISHERS))

    def test_where_no_expert_has_fisher_information_nothing_changes(self, twin: str) -> None:
        blind = [fisher.clone() for fisher in FISHERS]
        for fisher in blind:
            fisher[2, 3] = 0
        stack = TWINS[twin](EXPERTS)
        merged = update(merge(stack, "gaussian_poe", given=blind, preset="fisher"))
        assert merged[2, 3] == 0
        assert merged.count_nonzero() == merged.numel() - 1

    def test_regmean(self, twin: str) -> None:
        stack = TWINS[twin](EXPERTS)
        merged = merge(stack, "gaussian_poe", WEIGHTS, given=ACTIVATIONS, preset="regmean")
        assert_close(update(merged), reference.regmean(UPDATES, WEIGHTS, ACTIVATIONS))

    def test_regmean_is_the_least_squares_fit_of_the_outputs(self, twin: str) -> None:
        """X_i Mᵀ nearest to X_i A_iᵀ over all experts: a regression on the stacked inputs."""
        merged = merge(
            TWINS[twin](EXPERTS), "gaussian_poe", given=ACTIVATIONS, precision="activation", ridge=0
        )
        outputs = torch.cat([x @ a.T for x, a in zip(INPUTS, UPDATES, strict=True)])
        fit = torch.linalg.lstsq(torch.cat(INPUTS), outputs).solution
        assert_close(update(merged), fit.T)

    def test_wudi_is_minimised(self, twin: str) -> None:
        """Together the experts span every input, so that the minimum is unique without a ridge."""
        merged = merge(TWINS[twin](EXPERTS), "gaussian_poe", preset="wudi", ridge=0.0)
        point = update(merged).clone().requires_grad_()
        (slope,) = torch.autograd.grad(reference.wudi_objective(point, UPDATES), point)
        (there,) = torch.autograd.grad(
            reference.wudi_objective(start := torch.zeros_like(point).requires_grad_(), UPDATES),
            start,
        )
        assert slope.norm() <= 1e-10 * there.norm()
        other = update(merge(TWINS[twin](EXPERTS), "gaussian_poe", side="input", ridge=0.0))
        least = reference.wudi_objective(point, UPDATES)
        assert least < reference.wudi_objective(other, UPDATES)

    def test_cauchy_is_student_of_one_degree(self, twin: str) -> None:
        for scale in ("equivariant", "paper", "estimated"):
            same = {"scale": scale, "epsilon": 0.5, **SETTLED}
            student = merge(TWINS[twin](EXPERTS), "student_t_poe", WEIGHTS, nu=1.0, **same)
            cauchy = merge(TWINS[twin](EXPERTS), "cauchy_poe", WEIGHTS, **same)
            assert_close(update(student), update(cauchy), SLOW)

    def test_many_degrees_are_gaussian(self, twin: str) -> None:
        student = merge(TWINS[twin](EXPERTS), "student_t_poe", nu=1e9, scale="equivariant")
        say = tuple(1 / float((a.T @ a).square().sum()) for a in UPDATES)
        assert_close(update(student), update(merge(dense(EXPERTS), "gaussian_poe", say)), LIMIT)

    def test_every_named_row_is_another(self, twin: str) -> None:
        given = {"fisher": FISHERS, "regmean": ACTIVATIONS}
        rows = ("average", "fisher", "regmean", "wudi", "paper")
        stack = TWINS[twin](EXPERTS)
        found = [update(merge(stack, "gaussian_poe", given=given.get(r), preset=r)) for r in rows]
        for one, other in itertools.combinations(found, 2):
            assert distance(one, other) > 1e-2


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3, 4)])
@pytest.mark.parametrize("method", ["gaussian_poe", "cauchy_poe", "student_t_poe"])
def test_entrywise_rows_take_tensors_of_any_shape(shape: tuple[int, ...], method: str) -> None:
    """As if they were matrices of one row."""
    updates = [sheet(*shape, seed=seed) for seed in range(3)]
    fishers = [sheet(*shape, seed=10 + seed).square() for seed in range(3)]
    stack = DenseStack(torch.stack(updates).unsqueeze(0))
    settled = {} if method == "gaussian_poe" else {**SETTLED, "epsilon": 1.0}
    options = {"ridge": 0.02} | ({} if method == "gaussian_poe" else {"epsilon": 1.0})
    for precision, given in {"identity": None, "diagonal": fishers}.items():
        merged = merge(stack, method, given=given, precision=precision, **options | settled)
        rows = [a.reshape(1, -1) for a in updates]
        flat = None if given is None else [f.reshape(1, -1) for f in given]
        tail = method.removesuffix("_poe")
        expected = product(rows, [1.0] * 3, precision, "output", flat, tail=tail, **options)
        assert_close(update(merged), expected.solve().reshape(shape), SLOW)


@pytest.mark.parametrize("epsilon", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (6, 10), (10, 6)])
def test_the_published_procedure_in_fp32(
    shape: tuple[int, int], epsilon: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where matrices are large, and fp64 is for those alone that need it."""
    monkeypatch.setattr(solver, "SMALL", 0)
    updates = [0.3 * sheet(*shape, seed=seed) for seed in range(4)]
    stack = DenseStack(torch.stack(updates).unsqueeze(0).float())
    cauchy = update(merge(stack, "cauchy_poe", preset="paper", epsilon=epsilon))
    assert_close(cauchy, reference.published(updates, epsilon), PUBLISHED)
    gaussian = update(merge(stack, "gaussian_poe", preset="paper"))
    assert_close(gaussian, reference.published(updates, None), PUBLISHED)


class TestFiles:
    """Curvature of a tiny Llama, in files beside its experts."""

    LINEAR = ".mlp."

    def curvature(self, zoo: Zoo, folder: Path, kind: str, only: str = "") -> dict[str, str]:
        """A file an expert, for the tensors with `only` in their name."""
        files = {}
        for seed in (1, 2):
            weights = load_file(zoo.full(seed) / "model.safetensors")
            made = {}
            for index, (name, weight) in enumerate(sorted(weights.items())):
                if only in name:
                    sizes = weight.shape if kind == "diagonal" else (80, weight.shape[-1])
                    values = sheet(*sizes, seed=100 * seed + index).float()
                    made[name] = values.square() if kind == "diagonal" else values.T @ values
            files[f"e{seed}"] = str(folder / f"{kind}-{seed}.safetensors")
            save_file(made, files[f"e{seed}"])
        return files

    def merge(self, zoo: Zoo, out: Path, **settings: object) -> MergeReport:
        experts = {f"e{seed}": zoo.full(seed) for seed in (1, 2)}
        return merge_checkpoints(zoo.base(), experts, out, "gaussian_poe", "cpu", **settings)

    def weights(self, zoo: Zoo, out: Path) -> list[dict[str, Tensor]]:
        """Merged, e1, e2: in full, not as updates, since these methods were published for them."""
        folders = (out, zoo.full(1), zoo.full(2))
        files = [load_file(folder / "model.safetensors") for folder in folders]
        return [{n: w.double() for n, w in tensors.items()} for tensors in files]

    def test_fisher_merging(self, zoo: Zoo, tmp_path: Path) -> None:
        files = self.curvature(zoo, tmp_path, "diagonal")
        report = self.merge(
            zoo, tmp_path / "out", preset="fisher", curvature=files, weights={"e1": 3.0}
        )
        fishers = [load_file(file) for file in files.values()]
        merged, one, two = self.weights(zoo, tmp_path / "out")
        for name, weight in merged.items():
            pair = [3 * fishers[0][name].double(), fishers[1][name].double()]
            expected = (pair[0] * one[name] + pair[1] * two[name]) / (pair[0] + pair[1])
            assert_close(weight, expected, 1e-6)
        assert {tensor.rule for tensor in report.tensors} == {"formula"}
        assert "curvature" not in " ".join(report.warnings)

    def test_regmean(self, zoo: Zoo, tmp_path: Path) -> None:
        files = self.curvature(zoo, tmp_path, "activation", only=self.LINEAR)
        report = self.merge(zoo, tmp_path / "out", preset="regmean", curvature=files)
        seen = [load_file(file) for file in files.values()]
        merged, *experts = self.weights(zoo, tmp_path / "out")
        for name, weight in merged.items():
            both = [expert[name] for expert in experts]
            if self.LINEAR in name:
                given = [activations[name].double() for activations in seen]
                assert_close(weight, reference.regmean(both, (1.0, 1.0), given), 1e-5)
            else:
                assert_close(weight, (both[0] + both[1]) / 2, 1e-6)
        rules = {tensor.name: tensor.rule for tensor in report.tensors}
        assert {rules[n] for n in rules if self.LINEAR in n} == {"matrix"}
        assert {rules[n] for n in rules if self.LINEAR not in n} == {"average"}

    def test_tensors_without_curvature_are_named(self, zoo: Zoo, tmp_path: Path) -> None:
        files = self.curvature(zoo, tmp_path, "activation", only=self.LINEAR)
        report = self.merge(zoo, tmp_path / "out", preset="regmean", curvature=files)
        (note,) = [w for w in report.warnings if "curvature" in w]
        assert note.startswith("No curvature is given for ")
        assert note.endswith(" more; averaged.")
        assert note.count(".weight") == 3

    @pytest.mark.parametrize("method", ["average", "task_arithmetic"])
    def test_average_and_task_arithmetic(self, zoo: Zoo, tmp_path: Path, method: str) -> None:
        say = {"e1": 1.5, "e2": 0.5}
        strength = 2.0 if method == "task_arithmetic" else 1.0
        self.merge(zoo, tmp_path / "row", preset="average", weights=say, strength=strength)
        experts = {f"e{seed}": zoo.full(seed) for seed in (1, 2)}
        merge_checkpoints(zoo.base(), experts, tmp_path / "own", method, "cpu", weights=say)
        row, own = (load_file(tmp_path / n / "model.safetensors") for n in ("row", "own"))
        for name, weight in own.items():
            assert_close(row[name], weight, 1e-6)


@pytest.mark.parametrize("preset", ["average", "regmean", "fisher"])
def test_wanting_no_change_is_a_vote(preset: str) -> None:
    """An expert that leaves a matrix alone pulls towards 0 where its precision is not zero."""
    change = pair(5, 2, 4, seed=0)
    idle = (torch.zeros(5, 2, dtype=torch.float64), change[1])
    given = {
        "average": None,
        "regmean": [torch.eye(4, dtype=torch.float64)] * 2,
        "fisher": [torch.ones(5, 4, dtype=torch.float64)] * 2,
    }[preset]
    merged = merge(dense([change, idle]), "gaussian_poe", preset=preset, given=given)
    assert_close(update(merged), products([change])[0] / 2)
