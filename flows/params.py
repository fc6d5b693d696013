"""params.yaml as frozen models: every number of the pipeline, and nothing that is unknown."""

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flows.overrides import override, parse_yaml
from poemerge.documents import BY_HAND, read_text
from poemerge.errors import SettingError
from poemerge.redaction import carries_secret
from poemerge.settings import nearest

if TYPE_CHECKING:
    from tasks.sweep.space import Space

Dtype = Literal["float32", "bfloat16", "float16"]
AROUND = ("sweep", "promote", "schedule", "runtime")  # sections that change no stage's output
LABEL = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Label = Annotated[str, Field(pattern=LABEL)]  # a file name, a DVC stage, an MLflow run


class Section(BaseModel):
    """Frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SourceParams(Section):
    """Where a checkpoint or adapter comes from."""

    source: str = Field(
        min_length=1, description="a folder, a .gguf file, or an address: hf://org/name@revision"
    )
    sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="its content's; any other is refused"
    )


class FetchParams(Section):
    """The base and its experts, one by one or by the tags that the library has of them."""

    base: SourceParams
    experts: dict[Label, SourceParams]
    select: dict[str, str] | None = Field(
        None,
        min_length=1,
        description="tags; every expert of the library that has them all joins (docs/library.md)",
    )
    dtype: Dtype


class TaskVectorsParams(Section):
    """The task vectors have no numbers of their own."""


class MergeParams(Section):
    """The candidates: label → settings, with `method` where the label is not its name."""

    device: str
    dtype: Dtype | Literal["source"]
    strength: float = Field(ge=0)
    seed: int = Field(ge=0)
    memory: float | None = Field(gt=0)
    vocabulary: Literal["refuse", "pad", "base"] = Field(
        "refuse", description="of token rows that do not fit (docs/traps.md)"
    )
    foreign: Literal["refuse", "warn"] = Field(
        "refuse", description="of an expert that was not fine-tuned from the base"
    )
    methods: dict[Label, dict[str, Any]] = Field(min_length=1)

    def candidate(self, label: str) -> tuple[str, dict[str, Any]]:
        """Method and settings of a candidate; `strength` is the section's where it has none."""
        settings = {"strength": self.strength, **self.methods[label]}
        return settings.pop("method", label), settings


class EvaluateParams(Section):
    """What the candidates are scored on."""

    include: str
    trust: list[str] = Field(
        ["data/tasks"], description="folders whose tasks may run code (templates, `!function`)"
    )
    tasks: list[str]  # none: what lm-eval has no task for is merged, and neither scored nor chosen
    experts: Literal["own", "all"]
    validation: str
    limit: int | None = Field(ge=1)
    batch_size: int = Field(ge=1)
    dtype: Dtype
    device: str
    seed: int = Field(ge=0)

    @property
    def scoring(self) -> dict[str, Any]:
        """How a candidate is scored, whichever it is and on whatever tasks."""
        return self.model_dump(exclude={"tasks", "experts"})


class RegisterParams(Section):
    """Which candidate wins, and the name under which it is registered."""

    name: Label
    experiment: str = Field(min_length=1)
    choose: Literal["mean", "normalised"]
    store: Literal["dvc", "copy"]


class ReportParams(Section):
    """How closely the report looks into the merges."""

    detail: int = Field(ge=0)
    side: Literal["output", "input"]
    seed: int = Field(ge=0)
    device: str


class SweepParams(Section):
    """How the settings of merges are searched; no stage, and no part of a run."""

    sampler: Literal["grid", "random", "tpe"]
    trials: int = Field(ge=1)
    prune: bool
    seed: int = Field(ge=0)
    storage: str = Field(min_length=1)
    space: dict[Label, dict[str, Any]] = Field(min_length=1)


class PromoteParams(Section):
    """What a version must pass to become champion; no stage."""

    automatic: bool
    min_gain: float = Field(ge=-1, le=1)
    level: float = Field(gt=0, lt=1)
    max_drop: float = Field(ge=0, le=1)
    certificates: bool
    verify: bool


class ScheduleParams(Section):
    """When the pipeline runs by itself, and how long it may take; no stage."""

    cron: str = Field(min_length=1)
    timezone: str = Field(min_length=1)
    timeout: int | None = Field(ge=1)


class RuntimeParams(Section):
    """Where the shards of merges are made; no stage, for it changes no byte (docs/runners.md)."""

    runner: Literal["threads", "processes", "dask", "ray"]
    workers: int | None = Field(ge=1)
    address: str | None = Field(min_length=1)


class Params(Section):
    """The six sections, named like the stages, and those of commands around them."""

    fetch: FetchParams
    task_vectors: TaskVectorsParams
    merge: MergeParams
    evaluate: EvaluateParams
    register_: RegisterParams = Field(alias="register")
    report: ReportParams
    sweep: SweepParams | None = None
    promote: PromoteParams | None = None
    schedule: ScheduleParams | None = None
    runtime: RuntimeParams | None = None

    @property
    def sections(self) -> Mapping[str, Any]:
        """The plain values of the stages, as the YAML has them."""
        return self.model_dump(by_alias=True, exclude=set(AROUND))

    @property
    def devices(self) -> tuple[str, ...]:
        """Where a run computes, as the YAML names it."""
        scoring = (self.evaluate.device, self.report.device)
        return (self.merge.device, *scoring) if self.evaluate.tasks else (self.merge.device,)


def load(path: Path, overrides: Sequence[str] = ()) -> Params:
    """Read and check a parameter file.

    Args:
        path: a YAML file.
        overrides: `a.b=c` settings that replace what the file says.

    Raises:
        SettingError: the file, a key or a value is refused; one sentence.
    """
    tree = override(read(path), overrides)
    for text in _leaves(tree):
        if carries_secret(text):
            raise SettingError(
                f"{path}: {text} holds a password, a token or a query, and parameters are recorded "
                "with every model; leave it out, and say who you are in the environment."
            )
    try:
        params = Params.model_validate(tree)
    except ValidationError as error:
        raise SettingError(f"{path}: {_sentence(error)}") from error
    check(path, params)
    return params


def check(path: Path, params: Params) -> None:
    """Refuse settings that no method knows, and weights of experts that there are none of.

    Args:
        path: of the file, for the message.
        params: where experts are still to be selected, their names are not checked.

    Raises:
        SettingError: one sentence.
    """
    fetch = params.fetch
    if not fetch.experts and fetch.select is None:
        raise SettingError(
            f"{path}: fetch.experts is empty; name some, or give the tags of some in fetch.select."
        )
    experts = tuple(fetch.experts) if fetch.select is None else None
    _check_methods(path, params.merge, experts)
    if params.sweep:
        _check_sweep(path, params.sweep, experts)


def read(path: Path) -> dict[str, Any]:
    """The mapping in `path`, YAML 1.2 as DVC reads it: 1e-3 is a number, a key stands once."""
    try:
        tree = parse_yaml(read_text(path, BY_HAND))
    except FileNotFoundError as error:
        raise SettingError(f"{path} does not exist; run where it lies, or name it.") from error
    except (OSError, ValueError) as error:
        first = " ".join(str(error).split())
        raise SettingError(f"{path} is no readable YAML ({first}); mend it there.") from error
    if not isinstance(tree, dict):
        raise SettingError(f"{path} is no mapping of sections; see the README for its form.")
    return tree


def _leaves(value: Any) -> Iterator[str]:
    """Every text in a tree of mappings and lists."""
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value


def _check_methods(path: Path, merge: MergeParams, experts: tuple[str, ...] | None) -> None:
    for label in merge.methods:
        _check_settings(f"{path}: merge.methods.{label}", *merge.candidate(label), experts)


def _check_sweep(path: Path, sweep: SweepParams, experts: tuple[str, ...] | None) -> None:
    from tasks.sweep.space import Space  # noqa: PLC0415 - imports torch, as `_check_settings` does

    for label, given in sweep.space.items():
        where = f"{path}: sweep.space.{label}"
        try:
            space = Space.parse(label, given)
        except SettingError as error:
            raise SettingError(f"{where}: {error}") from error
        for settings in space.samples():
            _check_settings(where, space.method, settings, experts)
        if sweep.sampler == "grid":
            _check_grid(where, space, sweep.trials)


def _check_grid(where: str, space: "Space", trials: int) -> None:
    if not space.is_finite:
        raise SettingError(
            f"{where} has a range, which a grid cannot cover; list values, or set sweep.sampler "
            "to random or tpe."
        )
    if len(space.points()) > trials:
        raise SettingError(
            f"{where} has {len(space.points())} combinations where sweep.trials allows {trials}; "
            "shorten a list, raise sweep.trials, or set sweep.sampler to random or tpe."
        )


def _check_settings(
    where: str, method: str, settings: dict[str, Any], experts: tuple[str, ...] | None
) -> None:
    from poemerge.methods import find  # noqa: PLC0415 - imports torch, 1 s that --help need not pay

    try:
        parsed = find(method).settings.parse(settings)
    except SettingError as error:
        raise SettingError(f"{where}: {error}") from error
    if experts is None:
        return
    for name in parsed.weights:
        if name not in experts:
            raise SettingError(
                f"{where}.weights names {name!r}{nearest(name, experts)}; the experts are "
                f"{', '.join(experts)}."
            )


def _sentence(error: ValidationError) -> str:
    """The first problem as one sentence, with the nearest known key for an unknown one."""
    problem = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _known(problem["loc"][:-1])
        name = str(problem["loc"][-1])
        return f"unknown key {where}{nearest(name, known)}; known here: {', '.join(known)}."
    if problem["type"] == "missing":
        return f"{where} is missing; add it (the README has a params.yaml with every key)."
    message, given = problem["msg"].removeprefix("Value error, "), reprlib.repr(problem["input"])
    return f"{where}: {message[0].lower()}{message[1:]}, got {given}; mend it there."


def _known(location: tuple[int | str, ...]) -> list[str]:
    """Keys that the model at `location` has."""
    model: Any = Params
    for part in location:
        fields = {f.alias or name: f for name, f in getattr(model, "model_fields", {}).items()}
        if part in fields:
            model = fields[str(part)].annotation
            model = next((a for a in get_args(model) if isinstance(a, type)), model)
        if get_args(model):
            model = get_args(model)[-1]
    return [f.alias or name for name, f in getattr(model, "model_fields", {}).items()]
