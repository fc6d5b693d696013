"""What people see of a model's past: its tree, differences, verification, reproduction."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from flows.console import console
from poemerge.lineage import Source
from tasks.provenance.difference import Difference
from tasks.provenance.history import Evaluation, Made, Version
from tasks.provenance.reproduce import Reproduction
from tasks.provenance.search import Check, State
from tasks.provenance.verify import Verification
from tasks.tracking import flat

WEIGHTS = (".safetensors", ".gguf", ".bin")
HASH = 12  # digits of a hash that people are shown
COLOURS: dict[State, str] = {"intact": "green", "missing": "yellow", "changed": "bold red"}


def show_history(ref: str, made: Made) -> None:
    """The tree from a model down to its immutable sources; what many share is told once."""
    tree = Tree(f"[bold]{escape(ref)}[/]  {_title(made)}", guide_style="dim")
    _grow(tree, made, set(), top=True)
    console.print(tree, highlight=False, soft_wrap=True)


def show_differences(refs: Sequence[str], found: Iterable[Difference]) -> None:
    """One row a fact, of two models."""
    left, right = refs
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in ("what", "which", escape(left), escape(right)):
        table.add_column(column, overflow="fold")
    for each in found:
        table.add_row(
            each.section, escape(each.key), escape(_short(each.left)), escape(_short(each.right))
        )
    if table.row_count:
        console.print(table, highlight=False)
    else:
        console.print(escape(f"{left} and {right} differ in nothing."), highlight=False)


def show_verification(found: Verification) -> None:
    """One row the model and each source; then the files that are not intact, and the sum."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in ("what", "state", "files", "found at", "recorded address"):
        table.add_column(column, overflow="fold")
    for check in (found.own, *found.sources):
        state = f"[{COLOURS[check.state]}]{check.state}[/]"
        what, where = " ← ".join(check.role) or "the model itself", escape(check.where)
        table.add_row(escape(what), state, str(len(check.files)), where, escape(_address(check)))
    console.print(table, highlight=False)
    for check in (found.own, *found.sources):
        for state in list(COLOURS)[1:]:
            for name in check.having(state):
                place = check.where or check.address
                console.print(f"[{COLOURS[state]}]{state}[/] {escape(f'{place}: {name}')}")
    counts = ", ".join(f"{found.counts[state]} {state}" for state in COLOURS)
    console.print(f"{escape(found.ref)}: {counts}", highlight=False)


def show_reproduction(ref: str, found: Reproduction, *, kept: bool) -> None:
    """Conditions that were others, files that differ, and the verdict."""
    for caveat in found.caveats:
        console.print(f"[yellow]not as recorded[/] {escape(caveat)}", highlight=False)
    for name, how in found.differing.items():
        console.print(f"[bold red]{escape(name)}[/] {escape(how)}", highlight=False)
    verdict = (
        f"{len(found.differing)} of {len(found.differing) + len(found.equal)} files differ"
        if found.differing
        else f"reproduced: all {len(found.equal)} files are equal, byte by byte"
    )
    place = f" ({found.out})" if kept else ""
    console.print(escape(f"{ref}: {verdict}{place}"), highlight=False)


def _grow(tree: Tree, made: Made, told: set[str], *, top: bool = False) -> None:
    """Add what is known of a making, then its sources; `told` are digests of makings before it."""
    if made.digest in told:
        tree.add("[dim]as above[/]")
        return
    told.add(made.digest)
    record = made.record
    for version in made.versions:
        _add_version(tree.add(_named(version)), version)
    if settings := _settings(record.params):
        tree.add(escape(" ".join(f"{name}={value}" for name, value in settings.items())))
    code = _listed({name: value[:HASH] for name, value in record.code.items()})
    about = [code, record.device, _listed(record.packages)]
    tree.add(f"[dim]{escape('; '.join(filter(None, about)))}[/]")
    if top:
        _add_files(tree.add(f"outputs  [dim]digest {made.digest[:HASH]}[/]"), record.outputs)
    if made.evaluation:
        _add_scores(tree.add("scores"), made.evaluation)
    for source, below in made.sources:
        _add_source(tree, source, below, told)


def _add_source(tree: Tree, source: Source, made: Made | None, told: set[str]) -> None:
    """A source; a mere copy is not told apart from what it was copied from."""
    where = source.uri + (f" @ {_short(source.revision)}" if source.revision else "")
    branch = tree.add(
        f"[cyan]{escape(source.name)}[/]  {escape(where)}  [dim]digest {source.digest[:HASH]}[/]"
    )
    _add_files(branch, {n: h for n, h in source.files.items() if _is_telling(n, source)})
    if made is None:
        return
    if _is_copy(source, made):
        for _, each in made.sources:
            if each is not None:
                _grow(branch.add(f"made by {_title(each)}"), each, told)
    else:
        _grow(branch.add(f"made by {_title(made)}"), made, told)


def _is_telling(name: str, source: Source) -> bool:
    """Weights; of what has none, all."""
    return name.endswith(WEIGHTS) or not any(each.endswith(WEIGHTS) for each in source.files)


def _is_copy(source: Source, made: Made) -> bool:
    return made.record.stage == "fetch" and all(
        origin.files.items() <= source.files.items() for origin, _ in made.sources
    )


def _add_version(branch: Tree, version: Version) -> None:
    scores = {key: f"{value:.4f}" for key, value in version.metrics.items() if key.endswith("mean")}
    branch.add(f"[dim]{escape(version.source)}[/]")
    if scores:
        branch.add(escape(_listed(scores)))
    for name in ("poemerge.candidate", "poemerge.promoted", "poemerge.gain"):
        if version.tags.get(name):
            branch.add(escape(f"{name.removeprefix('poemerge.')} {version.tags[name]}"))
    for decision in version.decisions:
        branch.add(escape("{when} {kind} by {who}: {reason}".format(**decision)))


def _add_scores(branch: Tree, scored: Evaluation) -> None:
    for task, by in scored.scores.items():
        cells = _listed({split: f"{cell['score']:.4f}" for split, cell in by.items()})
        row = branch.add(escape(f"{task}: {cells}"))
        _add_files(row, scored.data.get(task, {}))


def _add_files(branch: Tree, files: Mapping[str, str]) -> None:
    for name, value in files.items():
        shown = value if ":" in value else _sha(value)  # a kind of hash that is named
        branch.add(f"[dim]{escape(f'{name}  {shown}')}[/]")


def _named(version: Version) -> str:
    aliases = "".join(f"  [bold green]{escape(alias)}[/]" for alias in version.aliases)
    return f"{escape(version.uri)}{aliases}"


def _title(made: Made) -> str:
    record = made.record
    return escape(" ".join(filter(None, (record.stage, str(record.params.get("method", ""))))))


def _settings(params: Mapping[str, Any]) -> dict[str, str]:
    """What decided the result; what is empty or off is left out."""
    given = params.get("settings")
    plain = {**params, **(given if isinstance(given, Mapping) else {})}
    plain |= {"settings": None, "method": None}
    return {k: v for k, v in flat(plain).items() if v not in {"", "null", "{}", "false"}}


def _address(check: Check) -> str:
    return " @ ".join(_short(part) for part in check.address.split(" @ ")) if check.role else ""


def _listed(facts: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _sha(value: str) -> str:
    return f"sha256 {value[:HASH]}…"


def _short(value: str) -> str:
    """A hash as people compare it; other text as it is."""
    is_hash = len(value) >= 32 and all(digit in "0123456789abcdef" for digit in value)
    return f"{value[:HASH]}…" if is_hash else value
