"""What needs the weights themselves: residuals of a merge, and how sure its mode is."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from poemerge.lineage import Source, core_code, digest, hash_files

if TYPE_CHECKING:
    from tasks.report.merges import Merge

logger = logging.getLogger(__name__)

Side = Literal["output", "input"]


@dataclass(frozen=True)
class Detail:
    """What was found inside one merge.

    Attributes:
        key: of all that decides it, so that it is not computed again.
        residuals: see `poemerge.residuals.describe_residuals`; empty where it cannot be known.
        uncertainty: see `poemerge.posterior.describe_uncertainty`; of products of experts alone.
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
        return Detail(
            key,
            self._residuals(folder, float(merge.settings.get("strength", 1.0))),
            self._uncertainty(merge) if merge.is_solved else {},
        )

    def _key(self, merged: Path) -> str:
        folders = {"base": self.base, **self.experts, "merged": merged}
        sources = [[name, Source(name, hash_files(path)).digest] for name, path in folders.items()]
        return digest([sources, self.side, self.seed, self.device, core_code()])

    def _residuals(self, merged: Path, strength: float) -> Mapping[str, Any]:
        if find_spec("poemerge.residuals") is None or strength == 0:
            return {}
        describe = import_module("poemerge.residuals").describe_residuals
        given = {"strength": strength, "side": self.side, "seed": self.seed}
        return describe(self.base, self.experts, merged, **given)

    def _uncertainty(self, merge: "Merge") -> Mapping[str, Any]:
        if find_spec("poemerge.posterior") is None:
            return {}
        describe = import_module("poemerge.posterior").describe_uncertainty
        return describe(self.base, self.experts, merge.method, merge.settings, device=self.device)
