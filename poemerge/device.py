"""Devices and stored dtypes by their names."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import torch

from poemerge.errors import SettingError

STORED: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def pick_device(device: str) -> torch.device:
    """The torch device for `auto`, `cpu` or `cuda[:i]`.

    Raises:
        SettingError: it is none of these, or there is no such GPU.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with suppress(RuntimeError):
        chosen = torch.device(device)
        if chosen.type == "cpu":
            return chosen
        if chosen.type == "cuda" and (chosen.index or 0) < torch.cuda.device_count():
            return chosen
    raise SettingError(
        f"device is {device!r}; choose auto, cpu or the cuda[:i] of a GPU that is here."
    )


def split_devices(devices: str) -> tuple[str, ...]:
    """Names of one device or of several, `cuda:0,cuda:1` say, in the order given.

    Raises:
        SettingError: one is named twice.
    """
    names = tuple(name.strip() for name in devices.split(","))
    if len(set(names)) < len(names):
        raise SettingError(f"device is {devices!r}; name each once.")
    return names


def describe_device(device: torch.device) -> str:
    """What shapes the bytes of a computation: the GPU's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def device_id(device: torch.device) -> str:
    """What the device is on this machine, whatever number this process sees it under."""
    if device.type == "cuda":
        return f"cuda-{torch.cuda.get_device_properties(device).uuid}"
    return device.type


@dataclass(frozen=True)
class Accelerators:
    """The GPUs of this machine, as torch sees them.

    Attributes:
        cuda: version that torch is built for; None where it is built for CPUs alone.
        names: of the GPUs, each with its memory.
    """

    cuda: str | None
    names: tuple[str, ...]

    @classmethod
    def find(cls) -> Self:
        """Ask torch."""
        found = [
            torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())
        ]
        names = tuple(f"{each.name}, {each.total_memory / 1e9:.0f} GB" for each in found)
        return cls(torch.version.cuda, names)
