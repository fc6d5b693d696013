"""What MLflow needs beside a merged folder to load it: `MLmodel`, requirements and the tokenizer.

The weights are named where they lie (`model_binary: .`): nothing large is stored twice, and the
folder loads without MLflow as well. No file holds a clock or an id, so that the same model has the
same files.
"""

import logging
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, Schema

from poemerge.atomic import write_text
from poemerge.layout import INDEX, RECORD
from poemerge.report import REPORT

NEVER = "1970-01-01 00:00:00"  # MLflow wants a time of creation, and would take the clock
PACKAGES = ("accelerate", "mlflow", "torch", "transformers")
ENVIRONMENT = "python_env.yaml"
OTHER = (INDEX, RECORD, REPORT)  # files that no tokenizer needs
TEXT = ModelSignature(Schema([ColSpec("string")]), Schema([ColSpec("string")]))
# task → the class that loads it, its pipeline, and the module of its python_function
TASKS = {
    "text-generation": ("AutoModelForCausalLM", "TextGenerationPipeline", "mlflow.transformers"),
    "text2text-generation": (
        "AutoModelForSeq2SeqLM",
        "Text2TextGenerationPipeline",
        "tasks.seq2seq",
    ),
}

logger = logging.getLogger(__name__)


@contextmanager
def company(model: Path, base: str) -> Iterator[Path]:
    """A temporary folder with the files that make `model` loadable where they lie beside its own.

    It is empty for what transformers cannot load, with a warning.

    Args:
        model: a merged folder.
        base: what was merged into, for the name in MLmodel.
    """
    with TemporaryDirectory() as name:
        folder, task = Path(name), _task(model)
        if task:
            _write(folder, model, task, base)
        yield folder


def _task(model: Path) -> str | None:
    from transformers import AutoConfig  # noqa: PLC0415 - 2 s, and only a new version needs it

    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        logger.warning(
            "%s is registered without MLmodel, so MLflow downloads it and does not load it: "
            "transformers cannot read its config (%s)",
            model,
            reason,
        )
        return None
    return "text2text-generation" if config.is_encoder_decoder else "text-generation"


def _write(folder: Path, model: Path, task: str, base: str) -> None:
    model_class, pipeline, loader = TASKS[task]
    described = Model(utc_time_created=NEVER, model_uuid=None, signature=TEXT)
    described.add_flavor(
        "transformers",
        transformers_version=metadata.version("transformers"),
        task=task,
        instance_type=pipeline,
        source_model_name=base,
        pipeline_model_type=model_class,  # never code of the model's own
        model_binary=".",
        components=["tokenizer"],
        tokenizer_type="AutoTokenizer",
    )
    described.add_flavor(
        "python_function",
        loader_module=loader,
        python_version=platform.python_version(),
        env={"virtualenv": ENVIRONMENT},
    )
    described.save(folder / "MLmodel")
    write_text(folder / "requirements.txt", "\n".join(map(_pinned, PACKAGES)) + "\n")
    python = f"python: {platform.python_version()}\ndependencies:\n- -r requirements.txt\n"
    write_text(folder / ENVIRONMENT, python)
    _copy_tokenizer(model, folder / "components" / "tokenizer")


def _pinned(package: str) -> str:
    return f"{package}=={metadata.version(package).split('+')[0]}"  # torch's build is the machine's


def _copy_tokenizer(model: Path, folder: Path) -> None:
    """Config and vocabulary; MLflow looks for them in a place of their own."""
    folder.mkdir(parents=True)
    for path in sorted(model.iterdir()):
        if path.is_file() and path.suffix not in (".safetensors", ".md") and path.name not in OTHER:
            shutil.copyfile(path, folder / path.name)
