"""One shard of a merge as a job that any process can do: names and paths in, a shard out."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from poemerge.atomic import disk_errors
from poemerge.device import describe_device, pick_device
from poemerge.errors import MachineError, SourceError
from poemerge.lineage import core_code, package_versions
from poemerge.merging.choices import Choices
from poemerge.merging.plan import Plan, plan_merge
from poemerge.merging.shards import Shard
from poemerge.merging.terms import Terms
from poemerge.merging.walk import Walk
from poemerge.remote.delivery import bring, workplace
from poemerge.remote.places import absolute
from poemerge.remote.stand_ins import url_of


@dataclass(frozen=True)
class Recipe:
    """A merge in names and paths, from which every process makes the same plan.

    Attributes:
        base: checkpoint folder, here or elsewhere.
        experts: name → checkpoint or adapter folder, in the order that counts.
        method: name of a method.
        settings: of the method.
        terms: on which experts are taken.
        choices: device, dtype, output, seed, rank, memory, draws.
    """

    base: Path | str
    experts: Mapping[str, Path | str]
    method: str
    settings: Mapping[str, Any]
    terms: Terms
    choices: Choices

    def plan(self) -> Plan:
        """Open everything, and decide on each tensor.

        Raises:
            PoemergeError: something cannot be merged; the message says what.
        """
        return plan_merge(self.base, self.experts, self.method, self.settings, self.terms)

    def elsewhere(self) -> Self:
        """The same for another process: of whatever folder, and without a second look at values."""
        settings = dict(self.settings)
        if files := settings.get("curvature"):
            settings["curvature"] = {n: str(Path(file).absolute()) for n, file in files.items()}
        experts = {name: absolute(folder) for name, folder in self.experts.items()}
        terms = replace(self.terms, values=False)
        base = absolute(self.base)
        return replace(self, base=base, experts=experts, settings=settings, terms=terms)


@dataclass(frozen=True)
class ShardJob:
    """What makes one shard.

    Attributes:
        recipe: of the merge, with absolute paths.
        folder: where the shard goes, here or elsewhere.
        file: name of the shard.
        threads: of the CPU; sums round by how they are split.
        maker: what the merge's record says of the code and the machine that it is made by.
    """

    recipe: Recipe
    folder: Path | str
    file: str
    threads: int
    maker: Mapping[str, str]

    @classmethod
    def of(cls, recipe: Recipe, folder: Path, files: Sequence[str]) -> list[Self]:
        """Jobs for some shards of a merge that is recorded as made here."""
        there, threads = recipe.elsewhere(), torch.get_num_threads()
        place, maker = url_of(folder) or folder.absolute(), _maker(recipe.choices.device)
        return [cls(there, place, file, threads, maker) for file in files]

    def __str__(self) -> str:
        return self.file

    def on(self, device: str) -> Self:
        """The same on another device of the same kind."""
        choices = replace(self.recipe.choices, device=torch.device(device))
        return replace(self, recipe=replace(self.recipe, choices=choices))


Work = Callable[[ShardJob], Shard]


def make_shard(job: ShardJob) -> Shard:
    """Do a job in this process, which it may have to itself.

    Raises:
        PoemergeError: see `merge_checkpoints`; or this process would make other bytes than the
            record says, or does not see what it must.
    """
    _check(job)
    made: list[Shard] = []
    with (
        disk_errors(job.folder),
        job.recipe.plan() as plan,
        workplace(job.folder) as folder,
        torch.inference_mode(),
    ):
        walk = Walk(plan, job.recipe.choices)
        walk.fill([walk.output(folder, made.append)], [job.file])
        (shard,) = made
        return replace(shard, tag=bring(folder / shard.file, shard.sha256))


def _check(job: ShardJob) -> None:
    host, recipe = platform.node(), job.recipe
    for place in (job.folder, recipe.base, *recipe.experts.values()):
        if isinstance(place, Path) and not place.exists():
            raise SourceError(
                f"A worker on {host} does not see {place}; workers need the folders of the merge "
                "under the same paths as the machine that asks for it (docs/runners.md)."
            )
    device = pick_device(str(recipe.choices.device))
    if torch.get_num_threads() != job.threads:
        torch.set_num_threads(job.threads)
    for what, here in _maker(device).items():
        if here != job.maker[what]:
            raise MachineError(
                f"A worker on {host} has {what} {here}, where the merge is recorded with "
                f"{job.maker[what]}; it would make other bytes: give all machines the same."
            )


def _maker(device: torch.device) -> dict[str, str]:
    code = core_code()
    named = {"device": describe_device(device), "poemerge": code["poemerge"]}
    return {**named, "code of poemerge": code["sha256"], **dict(package_versions())}
