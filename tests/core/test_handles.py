"""Files beyond those that are kept open: read all the same, unless they are others by now."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from poemerge import handles
from poemerge.errors import CheckpointError
from poemerge.tensor_files import TensorFiles

FILE = "model.safetensors"
WEIGHT = torch.arange(6.0).reshape(2, 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"w": WEIGHT}, tmp_path / FILE)
    return tmp_path


@pytest.fixture
def none_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "_most", lambda: 0)


def opened() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_kept_file_is_what_it_was_when_opened(folder: Path) -> None:
    with TensorFiles(folder, (FILE,)) as files:
        save_file({"w": -WEIGHT}, folder / "other")
        (folder / "other").replace(folder / FILE)
        assert torch.equal(files.read("w"), WEIGHT)


def test_all_are_let_go(folder: Path) -> None:
    before = opened(), len(handles._kept)
    files = [TensorFiles(folder, (FILE,)) for _ in range(5)]
    assert (opened(), len(handles._kept)) == (before[0] + 5, before[1] + 5)
    files.pop().close()
    files.clear()
    assert (opened(), len(handles._kept)) == before


@pytest.mark.usefixtures("none_kept")
class TestNotKept:
    def test_it_is_read(self, folder: Path) -> None:
        before = opened()
        with TensorFiles(folder, (FILE,)) as files:
            assert opened() == before
            assert torch.equal(files.read("w"), WEIGHT)
            assert torch.equal(files.read("w", (1, 2)), WEIGHT[1:])
        assert opened() == before

    def test_another_file_in_its_place_is_refused(self, folder: Path) -> None:
        with TensorFiles(folder, (FILE,)) as files:
            save_file({"w": -WEIGHT}, folder / "other")
            (folder / "other").replace(folder / FILE)
            with pytest.raises(CheckpointError, match=rf"{FILE} has changed meanwhile"):
                files.read("w")

    def test_a_file_that_is_gone_is_told(self, folder: Path) -> None:
        with TensorFiles(folder, (FILE,)) as files:
            (folder / FILE).unlink()
            with pytest.raises(CheckpointError, match=rf"{FILE} is gone .*; fetch it again"):
                files.read("w")
