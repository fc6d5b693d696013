"""On what terms experts are taken that do not fit their base in every way."""

from dataclasses import dataclass

from poemerge.errors import SettingError
from poemerge.token_rows import REFUSE, VOCABULARIES

WARN = "warn"
FOREIGN = (REFUSE, WARN)


@dataclass(frozen=True)
class Terms:
    """What is refused, what is bridged, and how closely that is looked at.

    Attributes:
        vocabulary: of token rows that are more, fewer or in another order: `refuse`; `pad`, which
            matches rows by token and takes added tokens over; `base`, which keeps the base's rows.
        foreign: of an expert in which nothing of the base is left: `refuse` or `warn`.
        dtype: that the merge is to be stored in.
        deep: look at every value, and not at a sample of each tensor.
    """

    vocabulary: str = REFUSE
    foreign: str = REFUSE
    dtype: str = "source"
    deep: bool = False

    def __post_init__(self) -> None:
        for name, known in (("vocabulary", VOCABULARIES), ("foreign", FOREIGN)):
            if getattr(self, name) not in known:
                raise SettingError(
                    f"{name} is {getattr(self, name)!r}; choose {', '.join(known[:-1])} or "
                    f"{known[-1]}."
                )


STRICT = Terms()
LENIENT = Terms(vocabulary="base", foreign=WARN)  # of those who only describe what is there
