"""The same work on a CUDA device: what the CPU says, no waiting in a step, a card too small."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from poemerge import describe_uncertainty
from poemerge.device import device_id
from poemerge.merge import SAMPLES, merge_checkpoints
from poemerge.merging import memory
from poemerge.method import METHODS, Call
from poemerge.methods import find
from poemerge.methods.cauchy_poe import Cauchy
from poemerge.poe import inference
from poemerge.poe.anderson import Anderson
from poemerge.poe.onesided import OneSided
from poemerge.task_vector import DenseStack, LowRankStack, Stack
from tests.core.stacks import assert_close, distance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
CUDA = torch.device("cuda")
SHAPES = {"wide": (96, 320), "tall": (640, 96), "large": (384, 512)}  # below and above SMALL
AGREE = 1e-4  # of fp32 solves on two devices, relative


def randn(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


def dense(rows: int, columns: int) -> Stack:
    return DenseStack(1e-2 * randn(2, 4, rows, columns, seed=1))


def factors(rows: int, columns: int) -> Stack:
    ups = tuple(randn(2, rows, 3 + i, seed=i) for i in range(4))
    downs = tuple(1e-2 * randn(2, 3 + i, columns, seed=10 + i) for i in range(4))
    return LowRankStack(ups, downs)


def call(device: torch.device) -> Call:
    weights = torch.tensor([[1.0, 0.5, 2.0, 1.0]] * 2, dtype=torch.float64, device=device)
    return Call(weights, tuple((10 * b, 10 * b + 1, 10 * b + 2, 10 * b + 3) for b in range(2)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("twin", [dense, factors])
def test_the_gpu_says_what_the_cpu_says(method: str, shape: tuple[int, int], twin) -> None:  # noqa: ANN001
    found, stack = find(method), twin(*shape)
    settings = found.settings.parse({})
    here = found.merge(stack, settings, call(torch.device("cpu")))
    there = found.merge(stack.to(CUDA), settings, call(CUDA))
    assert there.update.dense().device.type == "cuda"
    assert distance(there.update.dense().cpu(), here.update.dense()) < AGREE
    for mine, other in zip(here.certificates, there.certificates, strict=True):
        assert other["energies"][-1] == pytest.approx(mine["energies"][-1], rel=1e-5)
        assert other["converged"] == mine["converged"]


@pytest.fixture
def waiting_again() -> Iterator[None]:
    """Whatever a test forbids is allowed again after it."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("waiting_again")
def test_a_step_does_not_wait() -> None:
    form = OneSided.of_grams(dense(384, 512).to(CUDA).dense(), None, 384)
    ones = torch.ones(2, 4, dtype=torch.float64, device=CUDA)
    tail, ridge = Cauchy(ones, 0.1 * form.origins), 1e-3 * form.mean_diagonal(ones)
    mixer = Anderson(ones.log())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    merged, _ = form.mode(ones, ridge)
    for _ in range(3):
        state = inference._look(form, tail, merged, ones.log(), ridge)
        proposal, _ = mixer.next(state.used, state.asked, state.energy < torch.inf)
        merged, _ = form.mode(proposal.exp(), ridge)
    torch.cuda.set_sync_debug_mode("default")
    assert merged.isfinite().all()


def folders(root: Path, width: int = 320) -> tuple[Path, dict[str, Path]]:
    """A base and three experts, by hand: no library but safetensors."""
    base = {
        "model.embed_tokens.weight": randn(900, width, seed=0),
        "model.layers.0.q_proj.weight": randn(width, width, seed=1),
        "model.layers.1.q_proj.weight": randn(width, width, seed=2),
        "model.norm.weight": randn(width, seed=3),
    }
    made = {}
    for index, name in enumerate(("base", "a", "b", "c")):
        folder = root / name
        folder.mkdir()
        tensors = {
            key: (
                value + (index > 0) * 1e-2 * randn(*value.shape, seed=7 * index + place)
            ).bfloat16()
            for place, (key, value) in enumerate(base.items())
        }
        save_file(tensors, folder / "model.safetensors")
        made[name] = folder
    return made.pop("base"), made


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_on_the_gpu_is_the_merge_on_the_cpu(tmp_path: Path, method: str) -> None:
    base, experts = folders(tmp_path)
    for device in ("cpu", "cuda", "cuda:0"):
        merge_checkpoints(
            base, experts, tmp_path / device.replace(":", "-"), method, device, dtype="float32"
        )
    stored = [load_file(tmp_path / d / "model.safetensors") for d in ("cpu", "cuda", "cuda-0")]
    for name, weight in stored[0].items():
        assert_close(stored[1][name], weight, AGREE)
        assert torch.equal(stored[1][name], stored[2][name])  # the same bytes on a second run


@pytest.mark.parametrize("method", ["cauchy_poe", "ties"])
def test_what_does_not_fit_is_solved_on_the_cpu_and_said(tmp_path: Path, method: str) -> None:
    base, experts = folders(tmp_path)
    here = merge_checkpoints(base, experts, tmp_path / "cpu", method, "cpu", dtype="float32")
    real = find(method).merge
    refuse = 320 * 320

    def tight(stack: Stack, settings: object, asked: Call) -> object:
        if stack.dense().is_cuda and stack.dense()[0, 0].numel() > refuse:
            raise torch.cuda.OutOfMemoryError("made up")
        return real(stack, settings, asked)

    patched = pytest.MonkeyPatch()
    patched.setitem(METHODS, method, type(find(method))(**vars(find(method)) | {"merge": tight}))
    try:
        there = merge_checkpoints(base, experts, tmp_path / "gpu", method, "cuda", dtype="float32")
    finally:
        patched.undo()
    assert any(
        "model.embed_tokens.weight did not fit on the GPU and were solved on the CPU" in warning
        for warning in there.warnings
    )
    assert not any("did not fit" in warning for warning in here.warnings)
    for name, weight in load_file(tmp_path / "cpu/model.safetensors").items():
        assert_close(load_file(tmp_path / "gpu/model.safetensors")[name], weight, AGREE)


def test_a_card_that_is_really_full(tmp_path: Path) -> None:
    base, experts = folders(tmp_path)
    merge_checkpoints(base, experts, tmp_path / "warm", "cauchy_poe", "cuda")
    free, total = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    hold = 24 << 20
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + hold) / total)
    try:
        report = merge_checkpoints(base, experts, tmp_path / "full", "cauchy_poe", "cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert free > hold
    assert len(report.tensors) == 4


@pytest.mark.parametrize("method", ["gaussian_poe", "cauchy_poe", "student_t_poe"])
def test_experts_that_come_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    base, experts = folders(tmp_path)
    merge_checkpoints(base, experts, tmp_path / "cpu", method, "cpu", dtype="float32")
    monkeypatch.setitem(memory.ROOM, "cuda", 3 << 20)
    report = merge_checkpoints(base, experts, tmp_path / "gpu", method, "cuda", dtype="float32")
    assert "do not fit in memory together" in str(report.warnings)
    here, there = (load_file(tmp_path / d / "model.safetensors") for d in ("cpu", "gpu"))
    moved = load_file(base / "model.safetensors")
    for name, weight in here.items():
        gap = torch.linalg.norm(there[name] - weight)
        assert gap <= 1e-3 * torch.linalg.norm(weight - moved[name].float()), name


@pytest.mark.parametrize("sampler", ["laplace", "langevin"])
def test_draws_around_the_mode(tmp_path: Path, sampler: str) -> None:
    base, experts = folders(tmp_path, width=16)
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        how = {"dtype": "float32", "samples": 2, "sampler": sampler}
        merge_checkpoints(base, experts, out, "cauchy_poe", device, **how)
    for draw in ("000", "001"):
        here, there = (
            load_file(tmp_path / f"{d}{SAMPLES}" / draw / "model.safetensors")
            for d in ("cpu", "cuda")
        )
        for name, weight in here.items():
            assert_close(there[name], weight, 1e-2)  # a draw enlarges what two solves differ by


def test_where_a_merge_is_uncertain(tmp_path: Path) -> None:
    base, experts = folders(tmp_path)
    here, there = (
        describe_uncertainty(base, experts, "cauchy_poe", {}, device=d)["tensors"]
        for d in ("cpu", "cuda")
    )
    for name, facts in here.items():
        for fact, value in facts.items():
            assert there[name][fact] == pytest.approx(value, rel=1e-3)


def test_a_card_has_one_name_whatever_it_is_called() -> None:
    first = device_id(torch.device("cuda", 0))
    assert device_id(CUDA) == first
    assert first.startswith("cuda-")
    names = {device_id(torch.device("cuda", i)) for i in range(torch.cuda.device_count())}
    assert len(names) == torch.cuda.device_count()
