"""Where a model comes from, and whether that still holds: `lineage`, `verify`, `sign`.

What made the bytes is read from `lineage.json`; what changes with time (aliases, scores) from
MLflow.
"""
