"""Who merges, and with which words: one table of methods, one command line for each tool."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOW_TO_GET_MERGEKIT = """\
mergekit runs in an environment of its own:
    python3.11 -m venv mergekit-venv
    mergekit-venv/bin/pip install mergekit==0.1.5 torch
    python -m benchmarks.process FOLDER --mergekit mergekit-venv/bin/python"""


@dataclass(frozen=True)
class Method:
    """One merge in the words of both tools.

    Attributes:
        ours: method of poemerge.
        theirs: method of mergekit; for `cauchy_poe`, which it lacks, its slowest of these.
        settings: of ours.
        expert: parameters of each expert in mergekit.
        whole: parameters of the whole merge in mergekit.
    """

    ours: str
    theirs: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    expert: Mapping[str, float] = field(default_factory=lambda: {"weight": 1.0})
    whole: Mapping[str, Any] = field(default_factory=dict)


TIES = {
    "theirs": "ties",
    "expert": {"weight": 1.0, "density": 0.2},
    "whole": {"normalize": True},
}
METHODS = (
    Method("average", "linear"),
    Method("task_arithmetic", "task_arithmetic"),
    Method("ties", settings={"keep": 0.2}, **TIES),
    Method("cauchy_poe", **TIES),
)


@dataclass(frozen=True)
class Inputs:
    """What is merged, and the Python that mergekit is installed in."""

    base: Path
    experts: tuple[Path, ...]
    mergekit: Path
    dtype: str  # that mergekit computes in; ours is fp32 or better

    def poemerge(self, method: Method, out: Path) -> list[str]:
        """The command of ours."""
        command = [sys.executable, "-m", "flows.cli", "merge", "--base", str(self.base)]
        for expert in self.experts:
            command += ["--expert", str(expert)]
        for name, value in method.settings.items():
            command += ["--set", f"{name}={value}"]
        return [*command, "--method", method.ours, "--out", str(out), "--device", "cpu"]

    def announced(self, method: Method) -> list[str]:
        """The command that says how much memory ours will take."""
        settings = json.dumps(dict(method.settings))
        folders = map(str, (self.base, *self.experts))
        return [sys.executable, "-m", "benchmarks.announced", method.ours, settings, *folders]

    def mergekit_yaml(self, method: Method, out: Path) -> list[str]:
        """The command of mergekit; writes its recipe beside `out`."""
        recipe: dict[str, Any] = {
            "merge_method": method.theirs,
            "models": [
                {"model": str(expert), "parameters": dict(method.expert)} for expert in self.experts
            ],
            "parameters": dict(method.whole),
            "dtype": self.dtype,
            "out_dtype": "bfloat16",
        }
        if method.theirs != "linear":
            recipe["base_model"] = str(self.base)
        file = out.with_name(f"{out.name}.yaml")
        file.write_text(json.dumps(recipe, indent=2), encoding="utf-8")  # JSON is YAML
        return [str(self.mergekit.with_name("mergekit-yaml")), str(file), str(out)]

    def floor(self, out: Path) -> list[str]:
        """The command that only reads and writes."""
        folders = map(str, (self.base, *self.experts))
        return [sys.executable, "-m", "benchmarks.floor", str(out), *folders]

    def compare(self, *merged: Path) -> list[str]:
        """The command that compares merges with exact task arithmetic."""
        inputs = ",".join(map(str, (self.base, *self.experts)))
        return [sys.executable, "-m", "benchmarks.compare", inputs, *map(str, merged)]
