"""Does what a record says still hold? Everything that can be reached is hashed again."""

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from poemerge.hashing import digest, forget_hashes, sha256
from poemerge.layout import RECORD
from poemerge.names import listed
from tasks.provenance.model import Model, opened
from tasks.provenance.search import Check, Reach, Search, State, compare
from tasks.provenance.shelves import Shelves
from tasks.versions import is_own


@dataclass(frozen=True)
class Verification:
    """What became of a model and of all that it was made from.

    Attributes:
        own: the model's own bytes.
        sources: every source, and theirs; the same bytes at the same address count once.
    """

    ref: str
    own: Check
    sources: tuple[Check, ...]

    @property
    def counts(self) -> Mapping[State, int]:
        """How many files are in which state."""
        return Counter(
            state for check in (self.own, *self.sources) for state in check.files.values()
        )

    @property
    def problems(self) -> tuple[str, ...]:
        """What speaks against the model, in sentences: anything changed, or bytes of its own gone.

        A source that is gone is no problem: its hash is known, and the model is what it was.
        """
        said = [_sentence(self.own, "missing")]
        said += [_sentence(check, "changed") for check in (self.own, *self.sources)]
        return tuple(sentence for sentence in said if sentence)


def verify(ref: str, reach: Reach) -> Verification:
    """Hash everything again that can be reached from a model.

    Args:
        ref: a folder, `models:/...` or `dvc://...`.
        reach: where sources may be found.

    Raises:
        PoemergeError: the reference means nothing, or its record cannot be had.
    """
    forget_hashes()
    with opened(ref) as model, ExitStack() as stack:
        search = Search(reach, Shelves.below(reach.roots), stack)
        return Verification(ref, _own(model), tuple(search.below(model.record)))


def _own(model: Model) -> Check:
    """The model's bytes against its record; its record against what was registered."""
    states = dict(compare(model.record.outputs, model.files))
    beside = {n: p for n, p in model.files.items() if model.registered and not is_own(n)}
    for name in model.files.keys() - beside.keys() - {RECORD}:
        states.setdefault(name, "changed")  # a file that its record does not know
    whole = digest({name: sha256(path) for name, path in beside.items()}) == model.loader
    states |= dict.fromkeys(beside, "intact" if whole else "changed")
    if RECORD not in model.files:
        states[RECORD] = "missing"
    elif model.registered:
        states[RECORD] = "intact" if model.registered == model.digest else "changed"
    return Check((), model.ref, model.where, dict(sorted(states.items())))


def _sentence(check: Check, state: State) -> str:
    files = check.having(state)
    if not files:
        return ""
    verb = "are" if len(files) > 1 else "is"
    return f"{listed(files, 1)} of {check.where or check.address} {verb} {state}."
