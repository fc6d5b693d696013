"""The library of experts: registered models of MLflow, their bytes in DVC, found by tag."""

from tasks.library.expert import Expert, check_tags
from tasks.library.shelf import add, experts, remove, select

__all__ = ["Expert", "add", "check_tags", "experts", "remove", "select"]
