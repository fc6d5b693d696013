"""What needs the weights themselves: residuals of a merge, and how sure its mode is."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from poemerge.hashing import digest, hash_files
from poemerge.lineage import Lineage, Source, core_code

if TYPE_CHECKING:
    from tasks.report.merges import Merge

logger = logging.getLogger(__name__)

Side = Literal["output", "input"]


@dataclass(frozen=True)
class Detail:
    """What was found inside one merge.

    Attributes:
        key: of all that decides it, so that it is not computed again.
        residuals: as `describe_residuals` gives them; empty where they cannot be known.
        uncertainty: as `describe_uncertainty` gives it; of products of experts alone.
    """

    key: str
    residuals: Mapping[str, Any] = field(default_factory=dict)
    uncertainty: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Look:
    """How to look into merges.

    Attributes:
        base: checkpoint folder.
        experts: name → checkpoint or adapter folder.
        side: of the residuals.
        seed: where entries are sampled.
        device: auto, cpu or cuda[:i].
    """

    base: Path
    experts: Mapping[str, Path]
    side: Side
    seed: int
    device: str

    def into(self, folder: Path, merge: "Merge", known: Mapping[str, Detail]) -> Detail:
        """Describe the merge in `folder`, or take over what is `known` of the same bytes.

        Args:
            folder: merged model.
            merge: its report.
            known: key → detail.
        """
        key = self._key(folder)
        if key in known:
            return known[key]
        logger.info("looking into %s", merge.label)
        with self._unrounded(folder, merge) as exact:
            residuals = self._residuals(exact, float(merge.settings.get("strength", 1.0)))
        return Detail(key, residuals, self._uncertainty(merge) if merge.is_solved else {})

    def statistics(self) -> Mapping[str, Any]:
        """Of the experts' task vectors, where no stage has left them."""
        from poemerge.statistics import describe_task_vectors  # noqa: PLC0415 - imports torch

        return describe_task_vectors(self.base, self.experts)

    def _key(self, merged: Path) -> str:
        folders = {"base": self.base, **self.experts, "merged": merged}
        sources = [[name, Source(name, hash_files(path)).digest] for name, path in folders.items()]
        return digest([sources, self.side, self.seed, self.device, core_code()])

    def _residuals(self, merged: Path, strength: float) -> Mapping[str, Any]:
        if strength == 0:  # the merge is the base
            return {}
        from poemerge import describe_residuals  # noqa: PLC0415 - imports torch

        given: dict[str, Any] = {"strength": strength, "side": self.side, "seed": self.seed}
        return describe_residuals(self.base, self.experts, merged, **given)

    @contextmanager
    def _unrounded(self, folder: Path, merge: "Merge") -> Iterator[Path]:
        """The merge once more in fp32, where 16 bits round off more than the residuals are."""
        if not merge.is_rounded or merge.settings.get("curvature"):  # whose files are not at hand
            yield folder
            return
        from poemerge import merge_checkpoints  # noqa: PLC0415 - imports torch
        from poemerge.adapter import is_adapter  # noqa: PLC0415
        from poemerge.methods import find  # noqa: PLC0415

        method, record = find(merge.method), Lineage.find(folder)
        small = method.factors(method.settings.parse(merge.settings))
        small = small and all(map(is_adapter, self.experts.values()))
        how: dict[str, Any] = {
            "device": self.device,
            "dtype": "float32",
            "output": "adapter" if small else "full",
            "seed": record.params.get("seed", 0) if record else 0,
        }
        with TemporaryDirectory(dir=folder.parent, prefix=".fp32-") as scratch:
            exact = Path(scratch) / folder.name
            merge_checkpoints(self.base, self.experts, exact, merge.method, **how, **merge.settings)
            yield exact

    def _uncertainty(self, merge: "Merge") -> Mapping[str, Any]:
        from poemerge import describe_uncertainty  # noqa: PLC0415 - imports torch

        return describe_uncertainty(
            self.base, self.experts, merge.method, merge.settings, device=self.device
        )
