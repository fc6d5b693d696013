"""What experts of both kinds do with values: subtract the base's, refuse what is no number."""

import torch
from torch import Tensor

from poemerge.errors import CheckpointError
from poemerge.tensor_files import Rows, TensorFiles
from poemerge.token_rows import gather


def subtract(
    files: TensorFiles,
    placed: tuple[str, Tensor | None],  # the tensor's name, and its row for each of the base's
    base: Tensor,
    out: Tensor,
    rows: Rows | None,
) -> None:
    """Write W - W₀ of those rows into `out`; zero where W has no row for one of the base's."""
    key, order = placed
    if order is None:
        pinned = out.device.type == "cuda"
        out.copy_(files.read(key, rows, pinned=pinned), non_blocking=pinned).sub_(base)
        return
    wanted = order if rows is None else order[slice(*rows)]
    known = (wanted >= 0).nonzero().flatten()
    found, at = gather(files, key, wanted[known]).to(out), known.to(out.device)
    out.zero_()
    out[at] = found - base[at]


def is_finite(tensor: Tensor) -> bool:
    """True if no value is NaN or infinite."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def check_finite(tensor: Tensor, name: str, where: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        CheckpointError: naming the tensor and whose it is.
    """
    if not is_finite(tensor):
        raise CheckpointError(
            f"{name} of {where} holds NaN or infinite values; train or export it again."
        )
