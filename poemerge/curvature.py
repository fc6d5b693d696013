"""Experts' curvature, Fisher information or activations, from safetensors files."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from poemerge.errors import CheckpointError, SettingError
from poemerge.experts.values import check_finite
from poemerge.poe.experts import PRECISIONS
from poemerge.poe.settings import ProductSettings
from poemerge.settings import Settings
from poemerge.tensor_files import TensorFiles, TensorInfo


class Curvature:
    """The files of all experts, opened; use as a context.

    Args:
        experts: names of the experts, in order.
        settings: whose `curvature` names the files and whose `precision` says what they hold.

    Raises:
        SettingError: a file is missing for an expert, or given where none is needed.
        CheckpointError: a file is unreadable.
    """

    def __init__(self, experts: Sequence[str], settings: Settings) -> None:
        self._files: tuple[TensorFiles, ...] = ()
        self._open = ExitStack()
        named: Mapping[str, str] = getattr(settings, "curvature", {})
        self.needed = isinstance(settings, ProductSettings) and bool(
            PRECISIONS[settings.precision].curvature
        )
        if not self.needed and not named:
            return
        assert isinstance(settings, ProductSettings)
        self._square = PRECISIONS[settings.precision].matrices
        _check_names(experts, named, settings.precision, needed=self.needed)
        paths = [Path(named[name]) for name in experts]
        with ExitStack() as stack:
            self._files = tuple(
                stack.enter_context(TensorFiles(path.parent, (path.name,))) for path in paths
            )
            self._open = stack.pop_all()

    def entries(self, info: TensorInfo, voters: Sequence[int]) -> int:
        """Entries that each voter's file holds for a tensor; 0 if one has none.

        Raises:
            CheckpointError: it has another shape than it must.
        """
        if not self.needed or not all(info.name in self._files[i].tensors for i in voters):
            return 0
        expected = info.shape[-1:] * 2 if self._square else info.shape
        for found in (self._files[i].tensors[info.name] for i in voters):
            if found.shape != expected:
                raise CheckpointError(
                    f"{info.name} in a curvature file ({found.file}) has shape {found.shape} and "
                    f"not {expected}; compute it for this base."
                )
        return int(torch.Size(expected).numel())

    def read(self, infos: Sequence[TensorInfo], voters: Sequence[int]) -> Tensor:
        """Curvature of a batch, fp32 (B, E, *shape) or (B, E, I, I), on the CPU.

        Raises:
            CheckpointError: an entry is not finite, or negative on the diagonal.
        """
        return torch.stack([torch.stack([self._one(i, info) for i in voters]) for info in infos])

    def _one(self, voter: int, info: TensorInfo) -> Tensor:
        files = self._files[voter]
        given = files.read(info.name).float()
        where = f"the curvature in {files.folder / files.tensors[info.name].file}"
        check_finite(given, info.name, where)
        if self._square and not torch.allclose(given, given.mT, rtol=1e-3, atol=1e-6):
            raise CheckpointError(f"{info.name} of {where} is not symmetric; compute Xᵀ X again.")
        diagonal = given.diagonal() if self._square else given
        if bool((diagonal < 0).any()):
            raise CheckpointError(f"{info.name} of {where} has negative entries; compute it again.")
        return given

    def close(self) -> None:
        """Let go of the files."""
        self._open.close()


def _check_names(
    experts: Sequence[str], named: Mapping[str, str], precision: str, *, needed: bool
) -> None:
    if not needed:
        raise SettingError(
            f"curvature is given, but precision {precision} uses none; choose precision diagonal "
            "or activation, or leave it out."
        )
    for name in named:
        if name not in experts:
            raise SettingError(f"curvature names no expert by {name!r}; use {', '.join(experts)}.")
    for name in experts:
        if name not in named:
            raise SettingError(
                f"precision {precision} needs the curvature of expert {name!r}; name its file in "
                "the setting `curvature`."
            )
    for name, file in named.items():
        if not Path(file).is_file():
            raise SettingError(
                f"curvature of expert {name!r} is {file}, which is no file; mend it."
            )
