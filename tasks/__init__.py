"""Stages as Prefect tasks: paths in, paths out, one side effect each."""
