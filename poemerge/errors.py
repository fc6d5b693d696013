"""One exception tree: every message is a sentence that says what, where and what to do."""

from poemerge.redaction import redact

LONGEST = 1_000  # characters of a message


class PoemergeError(Exception):
    """Root of everything that poemerge refuses; the command line prints it and exits with 1.

    Whatever the message quotes of a library, no password or token is in it.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(message))

    def __str__(self) -> str:
        """One line that a terminal can show, whatever names and values a file has put into it."""
        text = super().__str__()
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class SourceError(PoemergeError):
    """A source cannot be found, fetched or trusted (missing folder, wrong hash, refused pickle)."""


class UnreachableError(SourceError):
    """A network fault: the same request may well succeed later."""


class CheckpointError(PoemergeError):
    """A checkpoint or adapter is unreadable, quantised, non-finite or does not fit its base."""


class SettingError(PoemergeError):
    """A method, a setting or a parameter file says something that poemerge does not know."""


class NumericalError(PoemergeError):
    """A solve failed although its inputs were sound."""


class MachineError(PoemergeError):
    """The machine gave out: its disk is full or read-only, its memory does not suffice."""
