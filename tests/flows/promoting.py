"""Promotion by command, and its gate in params.yaml."""

from pathlib import Path

from click.testing import CliRunner, Result

from flows.cli import main
from flows.overrides import save_values


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def set_gate(**values: float) -> None:
    save_values(Path("params.yaml"), [(("promote", key), v) for key, v in values.items()])
