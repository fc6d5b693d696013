"""Which folders a report reads, and that they belong together."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from poemerge.documents import check_file, read_json
from poemerge.errors import SettingError, SourceError
from poemerge.hashing import hash_files, sha256
from poemerge.lineage import Lineage, Source

REPORT = "merge_report.json"  # as in poemerge.report, which imports torch
BOARD = "leaderboard.json"
ENTRY = "registration.json"
STATISTICS = "task_vectors.json"
AGAIN = "run `poemerge run` again"
PLAIN = Path("artifacts")  # where a run with overrides leaves what they do not change


@dataclass(frozen=True)
class Sources:
    """Folders of a run, or of one merge; what is not there is not shown.

    Attributes:
        merges: label → merged model.
        experts: name → checkpoint or adapter, in the order of the merges.
        evaluations: kind → label → folder of items.json.
        task_vectors: folder of the experts' statistics.
        register: folder of the leaderboard.
    """

    merges: Mapping[str, Path]
    base: Path | None = None
    experts: Mapping[str, Path] = field(default_factory=dict)
    evaluations: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)
    task_vectors: Path | None = None
    register: Path | None = None

    @classmethod
    def find(cls, folder: Path, base: Path | None, experts: Mapping[str, Path]) -> Self:
        """What lies in the folder of a run, or of one merged model.

        Args:
            folder: `artifacts`, a folder below `.poemerge/runs`, or a merged model.
            base: of a merged model; a run has its own.
            experts: likewise.

        Raises:
            SettingError: it is neither, or was merged from other experts.
            SourceError: something that the run wrote is not there any more.
        """
        if (folder / "register" / BOARD).is_file():
            return cls._of_run(folder)
        if (folder / REPORT).is_file():
            _check_given(folder, base, experts)
            return cls({folder.resolve().name: folder}, base, experts)
        raise SettingError(
            f"{folder} holds neither register/{BOARD} nor {REPORT}; give the folder of a run "
            f"({PLAIN}, .poemerge/runs/...) or that of a merged model."
        )

    @classmethod
    def _of_run(cls, folder: Path) -> Self:
        rows = read(folder / "register" / BOARD)["rows"]
        labels = {kind: [r["label"] for r in rows if r["kind"] == kind] for kind in KINDS}
        merges = {label: _place(folder, f"merge/{label}") for label in labels["merge"]}
        names = read(next(iter(merges.values())) / REPORT)["experts"]
        own = {label: _place(folder, f"evaluate/experts/{label}") for label in labels["expert"]}
        scored = {label: _place(folder, f"evaluate/merges/{label}") for label in labels["merge"]}
        return cls(
            merges,
            _place(folder, "fetch/base"),
            {name: _place(folder, f"fetch/experts/{name}") for name in names},
            {
                "base": {"base": _place(folder, "evaluate/base")},
                "expert": own,
                "merge": scored,
            },
            _place(folder, "task_vectors"),
            folder / "register",
        )

    def default_out(self, folder: Path) -> Path:
        """Inside a run; beside a model, whose folder must stay what it is."""
        return folder / "report" if self.register else folder.with_name(f"{folder.name}-report")

    def hashed(self) -> tuple[Source, ...]:
        """Every folder with its files' hashes, by name: whoever found them, the same record."""
        named = {f"expert {name}": path for name, path in self.experts.items()}
        named |= {f"merge {label}": path for label, path in self.merges.items()}
        for kind, places in self.evaluations.items():
            named |= {f"evaluation {kind} {label}": path for label, path in places.items()}
        single = {"base": self.base, "task_vectors": self.task_vectors, "register": self.register}
        named |= {name: path for name, path in single.items() if path}
        return tuple(Source(name, hash_files(path)) for name, path in sorted(named.items()))

    def check(self) -> None:
        """See that leaderboard, evaluations and merges are of one run.

        Raises:
            SourceError: one was made again since.
        """
        record = Lineage.find(self.register) if self.register else None
        compared = {source.name: source.files for source in record.inputs} if record else {}
        for kind, folders in self.evaluations.items():
            for label, folder in folders.items():
                if compared.get(f"{kind} {label}") != hash_files(folder):
                    raise SourceError(f"{self.register} compares another {folder}; {AGAIN}.")
        for label, folder in self.evaluations.get("merge", {}).items():
            scored, merged = Lineage.find(folder), self.merges[label]
            bytes_of = hash_files(merged).items()
            read = [source.files.items() for source in scored.inputs] if scored else []
            if not any(files and files <= bytes_of for files in read):
                raise SourceError(f"{folder} was made from other bytes than {merged}; {AGAIN}.")


NOT = ("none of the experts", "not the base")
KINDS = ("base", "expert", "merge")


def _check_given(merged: Path, base: Path | None, experts: Mapping[str, Path]) -> None:
    """Refuse what the model was not merged from, as far as its record tells."""
    record = Lineage.find(merged)
    known = [source.files for source in record.inputs] if record else []
    given = {**experts, "base": base} if base else {}
    for name, folder in given.items():
        if known and hash_files(folder) not in known:
            raise SettingError(
                f"{name!r} is {NOT[name == 'base']} that {merged} was merged from; see "
                f"`poemerge lineage {merged}`."
            )


def read(path: Path) -> dict[str, Any]:
    """A JSON file as poemerge wrote it; whoever reads it need not doubt what is in it.

    Raises:
        SourceError: it is missing or unreadable, or is not what the record beside it speaks of.
    """
    try:
        check_file(path)
        record = Lineage.find(path.parent)
        if record is None or record.outputs.get(path.name) != sha256(path):
            raise SourceError(f"{path} is not as it was written; {AGAIN}.")
        return read_json(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} is unreadable ({error}); {AGAIN}.") from error


def _place(run: Path, name: str) -> Path:
    """The run's own output, or the plain one where the run did not make its own."""
    places = (run / name, run.resolve().parents[2] / PLAIN / name)
    for place in places:
        if place.is_dir():
            return place
    raise SourceError(f"{places[0]} is not there any more; {AGAIN}.")
