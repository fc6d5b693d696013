"""All Python of docs/ is executed, that of new methods here: their files do what the pages say."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

import poemerge
from tests.doc_pages import DOCS, PAGES, ROOT, blocks


def test_all_code_is_executed() -> None:
    executed = {*TestNewMethods.CHECKS, "family.md", "certificates.md", "residuals.md", "walk.md"}
    executed.add("lineage.md")
    pages = {page.relative_to(DOCS).as_posix() for page in PAGES}
    assert {page for page in pages if blocks(page, "python")} == executed


class TestNewMethods:
    """A page's file, put into a copy of the package, does what the page says."""

    CHECKS: ClassVar = {
        "adding-a-method.md": """
merged = merge("largest", deltas, floor=0.0)
say = torch.tensor([1.0, 3.0, 0.5]).double()
by_hand = deltas.gather(1, (say[:, None, None] * deltas.abs()).argmax(1, keepdim=True))[:, 0]
assert torch.equal(merged.update.dense(), by_hand)
assert torch.equal(merge("largest", deltas[:, :, :4]).update.dense(), by_hand[:, :4])
assert METHODS["largest"].local
assert not merge("largest", deltas, floor=100.0).update.dense().any()
""",
        "adding-an-energy.md": """
from itertools import pairwise
from poemerge.methods.geman_mcclure_poe import GemanMcClure
trust, scale = torch.tensor([[[1.0, 0.5, 0.0]], [[0.1, 2.0, 1.0]]], dtype=torch.float64)
tail = GemanMcClure(trust, scale)
for size in (0.0, 1e-3, 0.3, 1.0, 40.0):
    q = torch.full((1, 3), size, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(tail.energy(q).sum(), q)
    torch.testing.assert_close(tail.weights(q), 2 * slope)
    (bend,) = torch.autograd.grad(tail.weights(q).sum(), q)
    assert (bend <= 0).all()
for side in ("input", "output"):
    for scale in ("equivariant", "paper", "estimated"):
        for epsilon in (0.01, 0.1, 1.0):
            settings = {"side": side, "scale": scale, "epsilon": epsilon}
            (found,) = merge("geman_mcclure_poe", deltas, **settings).certificates
            rounding = 1e-12 + 10 * found["noise"]
            assert all(after <= before + rounding for before, after in pairwise(found["energies"]))
            assert found["converged"] and found["residual"] < 1e-5, (settings, found)
wide = merge("geman_mcclure_poe", deltas, epsilon=1e9).update.dense()
torch.testing.assert_close(wide, merge("cauchy_poe", deltas, epsilon=1e9).update.dense())
near = merge("geman_mcclure_poe", deltas, epsilon=0.3).update.dense()
assert not torch.allclose(near, merge("cauchy_poe", deltas, epsilon=0.3).update.dense(), rtol=1e-2)
""",
    }
    START = """
import torch
from poemerge.method import Call
from poemerge.methods import METHODS
from poemerge.task_vector import DenseStack

def merge(name, deltas, **settings):
    method, say = METHODS[name], torch.tensor([[1.0, 3.0, 0.5]], dtype=torch.float64)
    assert method.summary.endswith(".") and method.source
    return method.merge(DenseStack(deltas), method.settings.parse(settings), Call(say))

deltas = torch.randn(1, 3, 9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
"""

    @pytest.mark.parametrize("page", CHECKS)
    def test_the_file_works(self, page: str, tmp_path: Path) -> None:
        (code,) = blocks(page, "python")
        name = re.search(r"^@register.*?^def (\w+)", code, flags=re.DOTALL | re.MULTILINE)
        assert name
        shutil.copytree(Path(poemerge.__file__).parent, tmp_path / "poemerge")
        (tmp_path / f"poemerge/methods/{name[1]}.py").write_text(code, encoding="utf-8")
        script = self.START + self.CHECKS[page]
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("page", CHECKS)
    def test_the_file_is_in_the_house_style(self, page: str, tmp_path: Path) -> None:
        (code,) = blocks(page, "python")
        file = tmp_path / "method.py"
        file.write_text(code, encoding="utf-8")
        ruff = [sys.executable, "-m", "ruff"]
        config = ["--config", str(ROOT / "pyproject.toml"), str(file)]
        for command in (["format", "--check"], ["check", "--no-cache", "--ignore", "INP001"]):
            done = subprocess.run(
                [*ruff, *command, *config], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout
