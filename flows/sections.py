"""The sections of params.yaml as frozen models: every number, and nothing that is unknown."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.runners import RunnerName

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

    runner: RunnerName
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
