"""What is written: a page on which no name runs as a script, and files that the umask closes."""

import html
import os
import stat
from pathlib import Path

import torch
from safetensors.torch import save_file

from poemerge.atomic import new_folder, write_json
from poemerge.merge import merge_checkpoints
from tasks.fetch import fetch
from tasks.report import PAGE, write_report
from tasks.report.sources import Sources
from tests.reliability.trials import Trials
from tests.zoo import Zoo

HOSTILE = (
    "<script>alert(1)</script>",
    "$\\frac{1}{$",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "</title></style><svg onload=alert(1)>",
    "&lt;b&gt; ]]> <!--",
)


def test_pages(trials: Trials, tmp_path: Path) -> None:
    """Hostile names of experts and tensors stay text in the report, whose policy runs no script"""
    for number in trials(short=2, full=len(HOSTILE)):
        with trials.trial(number):
            name, root = HOSTILE[number], tmp_path / str(number)
            for folder, seed in (("base", 0), ("a", 1), ("b", 2)):
                torch.manual_seed(seed)
                (root / folder).mkdir(parents=True)
                tensors = {f"{name}.{i}.weight": torch.randn(4, 4) for i in range(2)}
                save_file(tensors, root / folder / "model.safetensors")
            experts = {name: root / "a", f"{name}2": root / "b"}
            merge_checkpoints(root / "base", experts, root / "m", "gaussian_poe")
            sources = Sources.find(root / "m", root / "base", experts)
            write_report(sources, root / "page", detail=1, side="input", seed=0, device="cpu")
            page = (root / "page" / PAGE).read_text(encoding="utf-8")
            policy = html.unescape(page.partition("Policy")[2].partition(">")[0])
            assert "default-src 'none'" in policy
            for tag in ("<script>alert", "<img src=x", "<svg", "<!--", "<b>"):
                assert tag not in page


def test_modes(trials: Trials, tmp_path: Path, zoo: Zoo) -> None:
    """What is written is open to nobody whom the umask keeps out"""
    masks = (0o077, 0o027, 0o022, 0o002)
    zoo.base(), zoo.full(1)
    for number in trials(short=2, full=8):
        root, mask = tmp_path / str(number), masks[number % len(masks)]
        root.mkdir()
        with trials.trial(number):
            before = os.umask(mask)
            try:
                fetch.fn("base", str(zoo.base()), root / "fetched")
                merge_checkpoints(root / "fetched", {"a": zoo.full(1)}, root / "merged", "average")
                with new_folder(root / "folder") as folder:
                    write_json(folder / "told.json", {})
            finally:
                os.umask(before)
            for path in root.rglob("*"):
                assert not stat.S_IMODE(path.stat().st_mode) & (mask | stat.S_IWOTH), path
