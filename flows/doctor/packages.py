"""Versions of what we depend on, and the device that would solve."""

import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from shutil import which

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from flows.doctor.finding import Finding, problem, warning
from poemerge.device import Accelerators, describe_device, pick_device

OURS = "poemerge"
PATIENCE = 5.0  # seconds
# What pip accepts beside Prefect, and what then happens.
CONSEQUENCES = {
    "fastapi": "no flow and no Prefect server starts",
    "sqlalchemy": "schedules never fire, and only the server's log says so",
}


def packages() -> Iterator[Finding]:
    """Every requirement in our own metadata against what is installed."""
    python, wanted = platform.python_version(), metadata(OURS)["Requires-Python"]
    if python not in SpecifierSet(wanted):
        yield problem("python", f"{python} is not {wanted}", f"use a Python {wanted}")
    needed = [Requirement(text) for text in requires(OURS) or ()]
    wrong = [finding for each in needed if (finding := _judge(each)) is not None]
    yield from wrong
    if not wrong:
        count = sum(1 for each in needed if each.marker is None)
        yield Finding("packages", f"Python {python}; all {count} requirements are met")


def _judge(needed: Requirement) -> Finding | None:
    """Nothing to say of what fits, or of an extra that is not installed."""
    optional = needed.marker is not None
    try:
        found = version(needed.name)
    except PackageNotFoundError:
        if optional:
            return None
        return problem(needed.name, "is not installed", f'pip install "{needed}"')
    if needed.specifier.contains(found, prereleases=True):
        return None
    said = f"{found} is outside {needed.specifier}"
    if needed.name in CONSEQUENCES:
        said += f": {CONSEQUENCES[needed.name]}"
    wanted = f'pip install "{needed.name}{needed.specifier}"'
    return warning(needed.name, said, wanted) if optional else problem(needed.name, said, wanted)


def device() -> Iterator[Finding]:
    """What `device: auto` takes, and why it is not the GPU."""
    torch, driver = Accelerators.find(), _driver()
    if torch.names:
        gpus = ", ".join(torch.names)
        yield Finding("device", f"{gpus}; CUDA {torch.cuda}, driver {driver or 'unknown'}")
    elif driver and torch.cuda is None:
        said = f"the driver of a GPU is here ({driver}), but this torch is built for CPUs"
        yield warning("device", said, "install a torch that is built for CUDA")
    elif driver:
        said = f"torch (CUDA {torch.cuda}) finds no GPU, though driver {driver} is here"
        yield warning("device", said, "update the driver, or see CUDA_VISIBLE_DEVICES")
    else:
        yield Finding("device", f"{describe_device(pick_device('cpu'))}; no driver of a GPU")


def _driver() -> str:
    """Version of NVIDIA's driver, empty where there is none."""
    program = which("nvidia-smi")
    if program is None:
        return ""
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(  # noqa: S603 - found on the path, no word from elsewhere
            asked, check=True, capture_output=True, text=True, timeout=PATIENCE
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()
