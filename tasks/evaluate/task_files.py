"""Local lm-eval tasks as files: where they are, and everything that decides their items."""

import difflib
import json
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from poemerge.documents import BY_HAND, check_tree, read_text
from poemerge.errors import SettingError
from poemerge.hashing import sha256

LOADERS = frozenset({"json", "csv", "text", "parquet", "arrow"})  # of datasets, for plain files


class File(NamedTuple):
    """A file as it is: its name is relative to the folder of tasks."""

    name: str
    path: Path
    sha256: str


@dataclass(frozen=True)
class TaskFiles:
    """A task by name, and what decides its items.

    Attributes:
        yaml: where it is defined; None for a task that is built into lm-eval.
        files: YAML with its includes, modules that `!function` names (what those import is not
            followed), data files.
        near: local tasks of like names, where it is none of them.
    """

    name: str
    yaml: Path | None = None
    files: tuple[File, ...] = ()
    near: tuple[str, ...] = ()


class Function(str):
    """A `!function` in a YAML file, `module.name`; nothing is imported here."""

    __slots__ = ()


def _are_names(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(map(_are_names, value)))


SOUND: Mapping[str, Callable[[object], bool]] = {  # what is read here
    "include": _are_names,
    "dataset_path": lambda value: value is None or isinstance(value, str),
    "dataset_kwargs": lambda value: value is None or isinstance(value, dict),
}


class _Loader(yaml.SafeLoader):
    """YAML that knows `!function` and runs nothing."""


_Loader.add_constructor("!function", lambda _, node: Function(node.value))


def find_tasks(
    names: Sequence[str], include: Path, trust: Sequence[Path | str]
) -> tuple[TaskFiles, ...]:
    """The named tasks in order; those that no YAML file below `include` defines are built in.

    Args:
        names: of tasks.
        include: folder of YAML files; they are read, and nothing of them is run.
        trust: folders that YAML files and modules of the named tasks must lie in, wherever links
            and includes lead.

    Raises:
        SettingError: the folder or a data file is missing, or a YAML file in it is broken, or a
            task lies outside of what is trusted.
    """
    if not include.is_dir():
        raise SettingError(f"{include} is not a folder; set evaluate.include to that of the tasks.")
    local: dict[str, tuple[Path, dict[str, Any], list[Path]]] = {}
    for path in sorted(include.rglob("*.yaml")):
        config, read = _read(path)
        name = config.get("task")
        if not isinstance(name, str):
            continue  # a group, or a template that others include
        if name in local:
            raise SettingError(f"{local[name][0]} and {path} both define {name}; rename one task.")
        local[name] = path, config, read
    for name in names:
        for path in local[name][2] if name in local else ():
            _check_trusted(name, path, trust)
    return tuple(
        _task_files(name, include, *local[name])
        if name in local
        else TaskFiles(name, near=tuple(difflib.get_close_matches(name, local, cutoff=0)))
        for name in names
    )


def local_data(config: Mapping[str, Any], path: Path) -> Any:
    """`data_files` of the YAML file `path`, absolute; None where the data are no plain files.

    Raises:
        SettingError: there is no such file.
    """
    data_files = (config.get("dataset_kwargs") or {}).get("data_files")
    return _locate(data_files, path) if config.get("dataset_path") in LOADERS else None


def broken_line(paths: Iterable[Path]) -> str | None:
    """Which line of a JSONL file is no JSON, as a sentence; None where all are."""
    for path in paths:
        if path.suffix == ".jsonl":
            for number, line in enumerate(path.read_bytes().splitlines(), start=1):
                try:
                    json.loads(line or b"null")
                except ValueError as error:
                    return f"{path}, line {number}, is no JSON ({error}); correct that line."
    return None


def _check_trusted(name: str, path: Path, trust: Sequence[Path | str]) -> None:
    """What a task does with an item is a template, which is code, as a `!function` is."""
    place = path.resolve()
    if not any(place.is_relative_to(Path(folder).resolve()) for folder in trust):
        folders = ", ".join(map(str, trust)) or "none"
        raise SettingError(
            f"Task {name} may run code from {place}, which is in no folder of evaluate.trust "
            f"({folders}); read that file, then add its folder there."
        )


def _task_files(name: str, include: Path, path: Path, config: Any, read: list[Path]) -> TaskFiles:
    data = [Path(file) for file in _leaves(local_data(config, path)) if _is_path(file)]
    unique = {os.path.relpath(file.resolve(), include.resolve()): file for file in (*read, *data)}
    files = tuple(File(name, file, sha256(file)) for name, file in sorted(unique.items()))
    return TaskFiles(name, path, files)


def _locate(data_files: Any, path: Path) -> Any:
    """A relative path is looked for beside the YAML file, then below each folder above it."""
    if isinstance(data_files, Mapping):
        return {split: _locate(files, path) for split, files in data_files.items()}
    if isinstance(data_files, list):
        return [_locate(file, path) for file in data_files]
    if not _is_path(data_files):
        return data_files
    for folder in path.resolve().parents:
        if os.path.isfile(folder / data_files):  # noqa: PTH113 - of a name too long, too
            return str(folder / data_files)
    raise SettingError(
        f"{path} names the data file {data_files}, which is neither beside it nor below a folder "
        "above it; correct `data_files`."
    )


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and "://" not in value


def _read(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[Path]]:
    """A YAML file with its includes, merged as lm-eval merges them, and every file behind it."""
    real = Path(os.path.realpath(path))  # of a link to itself too
    if real in above:
        raise SettingError(f"{path} includes itself; take it out of `include`.")
    config = _parse(path)
    read = [path, *_modules(config, path.parent)]
    merged: dict[str, Any] = {}
    included = config.pop("include", [])
    for name in included if isinstance(included, list) else [included]:
        below, more = _read(path.parent / name, (*above, real))
        merged |= below
        read += more
    return merged | config, read


def _parse(path: Path) -> dict[str, Any]:
    try:
        config = yaml.load(read_text(path, BY_HAND), _Loader)  # noqa: S506 - a SafeLoader
        check_tree(config)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise SettingError(
            f"{path}, line {line}, is no YAML ({error.problem}); correct that line."
        ) from error
    except Exception as error:  # odd tags make the parser raise anything
        raise SettingError(f"{path} is unreadable ({error}); correct or remove it.") from error
    if not isinstance(config, dict):
        raise SettingError(f"{path} is no mapping of names to values; correct or remove it.")
    for name, is_sound in SOUND.items():
        if name in config and not is_sound(config[name]):
            value = reprlib.repr(config[name])
            raise SettingError(
                f"{path} has {name}: {value}, which lm-eval does not know; correct it."
            )
    return config


def _modules(config: Any, folder: Path) -> Iterator[Path]:
    """Python files beside the YAML file that its `!function` tags name."""
    for leaf in _leaves(config):
        if isinstance(leaf, Function):
            module = folder / (leaf.rpartition(".")[0].replace(".", "/") + ".py")
            if module.is_file():
                yield module


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(inner)
    else:
        yield value
