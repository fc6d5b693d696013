"""The ways in: what a user can call or type that reads a file, by name.

A case's folder is the working directory. It holds what the way needs: `base` and `expert`, a
`model` that was merged from them, a `run`, `params.yaml`. Whatever is made, is made as `out`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

Way = Callable[[Path], Mapping[str, Any] | None]
WAYS: dict[str, Way] = {}
NEEDS: dict[str, tuple[str, ...]] = {}
CORE = ("poemerge.merge", "poemerge.extract", "poemerge.statistics")
FETCH = ("tasks.fetch", "transformers", "gguf")
LLAMA = (
    *("transformers.models.llama.modeling_llama", "transformers.modeling_gguf_pytorch_utils"),
    *("transformers.integrations.gguf", "transformers.tokenization_utils_tokenizers", "accelerate"),
)
COMMANDS = (*CORE, "flows.cli", "flows.console", "flows.overrides", "flows.turns", "click.testing")
RECORDS = (
    *(*COMMANDS, *FETCH, "flows.provenance", "flows.lineage_tree", "tasks.dvc_store", "dvc.repo"),
    *(f"mlflow.store.{name}.sqlalchemy_store" for name in ("tracking", "model_registry")),
)
PAGES = (
    *COMMANDS,
    "tasks.report.page",
    "tasks.report.sections",
    "scipy.stats",
    "PIL.PngImagePlugin",
)
OTHERS = {  # commands that need other modules than those of records
    **dict.fromkeys(("check", "merge", "extract"), COMMANDS),
    **dict.fromkeys(("report model", "report run"), PAGES),
    "experts add": (*RECORDS, "flows.library", "flows.versioning"),
    "verify signed": (*RECORDS, "model_signing.verifying", "tasks.provenance.sign"),
}
MODELS = ("--base", "base", "--expert", "expert")
AVERAGE = (*MODELS, "--method", "average", "--device", "cpu")


def prepare(name: str) -> None:
    """Import what a way needs, once for all cases."""
    for module in NEEDS[name]:
        import_module(module)


def way(*needs: str) -> Callable[[Way], Way]:
    """Names a function as a way, with the modules that it needs."""

    def named(function: Way) -> Way:
        name = function.__name__.replace("_", " ")
        WAYS[name], NEEDS[name] = function, needs
        return function

    return named


@way(*CORE)
def plan(_: Path) -> None:
    """The plan of a merge, as `poemerge check` has it."""
    from poemerge.merging.plan import plan_merge

    with plan_merge(Path("base"), {"expert": Path("expert")}, "cauchy_poe", {}) as found:
        found.peak_bytes()


@way(*CORE)
def merge(_: Path) -> None:
    """The average of one expert is that expert, which is simple to check."""
    from poemerge.merge import merge_checkpoints

    merge_checkpoints("base", {"expert": "expert"}, "out", "average", device="cpu")


@way(*CORE)
def product(_: Path) -> None:
    """A product of experts."""
    from poemerge.merge import merge_checkpoints

    merge_checkpoints("base", ["expert"], "out", "gaussian_poe", device="cpu")


@way(*CORE)
def extract(_: Path) -> None:
    """A rank at which nothing is lost."""
    from poemerge.extract import extract_adapter

    extract_adapter("base", "expert", "out", 64, device="cpu")


@way(*CORE)
def describe(_: Path) -> None:
    """Statistics of the task vectors."""
    from poemerge.statistics import describe_task_vectors

    describe_task_vectors(Path("base"), {"expert": Path("expert")})


@way(*CORE, *FETCH)
def fetch(_: Path) -> None:
    """A copy of the expert."""
    from tasks.fetch import fetch as fetched

    fetched.fn("expert", "expert", "out", dtype="float32")


@way(*CORE, *FETCH, *LLAMA)
def convert(_: Path) -> None:
    """A folder of safetensors from a .gguf file."""
    from tasks.fetch import fetch as fetched

    fetched.fn("base", "model.gguf", "out", dtype="float32")


def command(*arguments: str) -> Mapping[str, Any]:
    """What a user types after `poemerge`, and how that ends."""
    import traceback

    from click.testing import CliRunner

    from flows.cli import main

    done = CliRunner().invoke(main, arguments)
    crash = ""
    if done.exc_info and not isinstance(done.exception, SystemExit | None):
        crash = "".join(traceback.format_exception(*done.exc_info))
    return {"code": done.exit_code, "said": done.stderr, "told": done.stdout, "crash": crash}


@way("flows.params", "poemerge.methods", "tasks.sweep.space")
def load_params(folder: Path) -> None:
    """What every command on a params.yaml does first."""
    import json

    from flows.params import load

    taken = load(Path("params.yaml")).model_dump(by_alias=True)
    (folder / "taken.json").write_text(json.dumps(taken))


@way(*CORE, "tasks.evaluate.lm_tasks", "datasets.packaged_modules.json.json")
def load_task(folder: Path) -> None:
    """What an evaluation does first."""
    import json

    from tasks.evaluate.lm_tasks import load_task as loaded
    from tasks.evaluate.task_files import find_tasks

    (files,) = find_tasks(["red"], Path("tasks"), [Path("tasks")])
    task = loaded(files)
    rows = {split: list(task.task.dataset[split]) for split in task.task.dataset}
    (folder / "taken.json").write_text(json.dumps({"test": task.test, "rows": rows}))


@way(*CORE, "tasks.evaluate.harness", "datasets.packaged_modules.json.json")
def evaluate(_: Path) -> None:
    """Two items of a task."""
    from tasks.evaluate import evaluate as scored

    how = {"limit": 2, "batch_size": 2, "dtype": "float32", "device": "cpu", "seed": 0}
    names = {"tasks": ["red"], "splits": ["test"], "include": "tasks", "validation": "validation"}
    scored.fn("base", "base", "base", None, "out", **names, **how, trust=["tasks"])


LINES: Mapping[str, tuple[str, ...]] = {
    "check": ("check", *AVERAGE),
    "merge": ("merge", *AVERAGE, "--out", "out"),
    "extract": ("extract", *MODELS, "--rank", "64", "--device", "cpu", "--out", "out"),
    "lineage": ("lineage", "model"),
    "lineage json": ("lineage", "model", "--json"),
    "lineage diff": ("lineage", "model", "other", "--diff"),
    "verify": ("verify", "model"),
    "verify signed": ("verify", "model", "--public-key", "key.pub"),
    "reproduce": ("reproduce", "model", "--out", "out"),
    "report model": ("report", "model", "--out", "out", "--device", "cpu"),
    "report run": ("report", "run", "--out", "out", "--detail", "0", "--device", "cpu"),
    "run": ("run",),
    "sweep": ("sweep",),
    "deploy": ("deploy",),
    "experts add": ("experts", "add", "expert", "--task", "red", "--base", "base", "--no-score"),
}
STARTING = ("run", "sweep", "deploy")  # which start a server, once the parameters are read


def start(line: tuple[str, ...], folder: Path) -> Mapping[str, Any] | None:
    """A command on parameters that it must refuse; what it would take over is not run."""
    from poemerge.errors import PoemergeError

    try:
        return load_params(folder)
    except PoemergeError:
        return command(*line)


def _typed(line: tuple[str, ...]) -> Way:
    return partial(start, line) if line[0] in STARTING else lambda _: command(*line)


for _name, _line in LINES.items():
    WAYS[f"poemerge {_name}"] = _typed(_line)
    NEEDS[f"poemerge {_name}"] = OTHERS.get(_name, RECORDS)
