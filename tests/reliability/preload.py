"""What contenders have behind them when they start: the command's own settings, then imports."""

from importlib import import_module

from flows.cli import calm_down

calm_down()
for name in (
    "dvc.cli",
    "dvc.commands.add",
    "flows.console",
    "flows.pipeline",
    "flows.prefect_server",
    "flows.promote",
    "poemerge.merge",
    "tasks.evaluate.harness",
    "tasks.evaluate.lm_tasks",
    "tasks.evaluate.scorer",
    "tasks.register.registry",
    "tasks.report.page",
):
    import_module(name)
