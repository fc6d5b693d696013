"""Matrices in pieces: each has weights of its own, and is what the reference solves by itself."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from poemerge.errors import SettingError
from poemerge.merge import expert_weights, merge_checkpoints
from poemerge.method import Call, Cut
from poemerge.methods import find
from poemerge.task_vector import DenseStack
from poemerge.update import LowRank
from tests.core.stacks import assert_close, dense, distance, factors, merge, pair, update
from tests.core.stacks import product as products
from tests.reference_family import product
from tests.zoo import Zoo

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
FILE = "model.safetensors"


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


class TestCheckpoints:
    """Names and the config decide on heads and fused projections."""

    HEAD = 8  # of the zoo's Llama: 32 wide, 4 heads, 2 of keys and values

    def merge(self, base: Path, out: Path, experts: dict[str, Path], **options: object) -> object:
        settings = {"method": "cauchy_poe", "epsilon": 0.5, "device": "cpu"} | options
        return merge_checkpoints(base, experts, out, **settings)

    def experts(self, zoo: Zoo) -> dict[str, Path]:
        return {f"e{seed}": zoo.full(seed) for seed in (1, 2, 3)}

    def stack(self, zoo: Zoo, name: str) -> tuple[Tensor, DenseStack]:
        base, *full = (load_file(p / FILE)[name] for p in (zoo.base(), *map(zoo.full, (1, 2, 3))))
        return base, DenseStack(torch.stack([weight - base for weight in full]).unsqueeze(0))

    @pytest.mark.parametrize("side", ["output", "input"])
    def test_heads(self, zoo: Zoo, tmp_path: Path, side: str) -> None:
        report = self.merge(
            zoo.base(), tmp_path / "out", self.experts(zoo), granularity="head", side=side
        )
        pieces = {t.name: t.certificate["pieces"] for t in report.tensors if t.certificate}
        expected = {"q": ("rows", 4), "k": ("rows", 2), "v": ("rows", 2), "o": ("columns", 4)}
        merged = load_file(tmp_path / "out" / FILE)
        for name, count in pieces.items():
            letter = name.split(".")[-2].removesuffix("_proj")
            if letter not in expected:
                assert count == 1
                continue
            axis, heads = expected[letter]
            assert count == heads
            base, stack = self.stack(zoo, name)
            cut = Cut(axis, (self.HEAD,) * heads)
            solved = update(merge(stack, "cauchy_poe", epsilon=0.5, cut=cut, side=side))
            assert_close(merged[name] - base, solved.float(), 1e-4)
        assert sum(count > 1 for count in pieces.values()) == 8

    def test_fused(self, zoo: Zoo, tmp_path: Path) -> None:
        """A declared pattern, here on a matrix that plays the part."""
        name, sizes = "model.layers.1.mlp.up_proj.weight", (40, 16, 8)
        self.merge(
            zoo.base(), tmp_path / "out", self.experts(zoo), fused={"*.1.*up_proj.weight": sizes}
        )
        base, stack = self.stack(zoo, name)
        merged = load_file(tmp_path / "out" / FILE)
        parts = [
            update(merge(DenseStack(part), "cauchy_poe", epsilon=0.5))
            for part in stack.deltas.split(sizes, dim=-2)
        ]
        assert_close(merged[name] - base, torch.cat(parts).float(), 1e-4)
        other = name.replace(".1.", ".0.")
        base, stack = self.stack(zoo, other)
        whole = update(merge(stack, "cauchy_poe", epsilon=0.5))
        assert_close(merged[other] - base, whole.float(), 1e-4)

    def test_fused_sizes_that_do_not_add_up(self, zoo: Zoo, tmp_path: Path) -> None:
        pattern = (
            r"fused gives model.layers.0.mlp.up_proj.weight 40 \+ 16 rows, but it has 64; give"
        )
        fused = {"*.up_proj.weight": [40, 16]}
        with pytest.raises(SettingError, match=pattern):
            self.merge(zoo.base(), tmp_path / "o", self.experts(zoo), fused=fused)
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize("precision", ["identity", "diagonal"])
    @pytest.mark.parametrize(
        "pieces", [{"granularity": "head"}, {"fused": {"*.up_proj.weight": [32, 32]}}]
    )
    def test_pieces_by_name_of_what_is_no_matrix(
        self, zoo: Zoo, tmp_path: Path, precision: str, pieces: dict[str, object]
    ) -> None:
        with pytest.raises(SettingError, match=f"no meaning with precision {precision}"):
            self.merge(zoo.base(), tmp_path / "o", self.experts(zoo), precision=precision, **pieces)

    @pytest.mark.parametrize(
        "value", [{"*": [64]}, {"*": 64}, {"*": [32, 0]}, ["*"], {"*": [1.5, 2]}]
    )
    def test_fused_that_is_no_mapping_to_sizes(
        self, zoo: Zoo, tmp_path: Path, value: object
    ) -> None:
        with pytest.raises(SettingError, match="lists of two or more sizes"):
            self.merge(zoo.base(), tmp_path / "o", self.experts(zoo), fused=value)

    def test_head_size_absent_from_the_config(self, zoo: Zoo, tmp_path: Path) -> None:
        base = Path(shutil.copytree(zoo.base(), tmp_path / "base"))
        config = json.loads((base / "config.json").read_text())
        silent = {k: v for k, v in config.items() if k not in {"head_dim", "num_attention_heads"}}
        (base / "config.json").write_text(json.dumps(silent))
        pattern = "config.json says nothing of a head's size .*; choose granularity rows"
        with pytest.raises(SettingError, match=pattern):
            self.merge(base, tmp_path / "o", self.experts(zoo), granularity="head")
        stated = {k: v for k, v in config.items() if k != "head_dim"}
        (base / "config.json").write_text(json.dumps(stated))
        report = self.merge(base, tmp_path / "o", self.experts(zoo), granularity="head")
        assert max(t.certificate.get("pieces", 0) for t in report.tensors) == 32 // self.HEAD

    def test_what_leaves_the_factors_is_no_adapter(self, zoo: Zoo, tmp_path: Path) -> None:
        files = {}
        for seed in (1, 2):
            files[f"e{seed}"] = str(tmp_path / f"{seed}.safetensors")
            seen = {n: torch.eye(32) for n in load_file(zoo.base() / FILE) if "q_proj" in n}
            save_file(seen, files[f"e{seed}"])
        experts = {f"e{seed}": zoo.adapter(seed, target_modules=["q_proj"]) for seed in (1, 2)}
        settings = {"precision": "activation", "curvature": files, "output": "adapter"}
        self.merge(zoo.base(), tmp_path / "out", experts, **settings)
        with pytest.raises(SettingError, match="makes dense updates with these settings"):
            self.merge(zoo.base(), tmp_path / "o", experts, granularity="rows", **settings)

    @pytest.mark.parametrize("granularity", ["head", "rows", "square"])
    @pytest.mark.parametrize("side", ["output", "input"])
    def test_adapters_stay_adapters(
        self, zoo: Zoo, tmp_path: Path, side: str, granularity: str
    ) -> None:
        experts = {f"e{seed}": zoo.adapter(seed) for seed in (1, 2)}
        settings = {"granularity": granularity, "side": side, "block_rows": 12}
        self.merge(zoo.base(), tmp_path / "small", experts, output="adapter", **settings)
        self.merge(zoo.base(), tmp_path / "full", experts, **settings)
        merged = load_file(tmp_path / "full" / FILE)
        start = load_file(zoo.base() / FILE)
        for name, weight in expert_weights(zoo.base(), tmp_path / "small"):
            assert_close(weight - start[name], merged[name] - start[name], 1e-4)
        factors_ = load_file(tmp_path / "small/adapter_model.safetensors")
        assert {t.shape[0] for n, t in factors_.items() if "lora_A" in n} == {8}


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
