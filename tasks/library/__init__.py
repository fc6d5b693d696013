"""The library of experts: registered models of MLflow, their bytes in DVC, found by tag."""

from tasks.library.expert import Expert, check_tags
from tasks.library.shelf import add, experts, find, remove, select

__all__ = ["Expert", "add", "check_tags", "experts", "find", "remove", "select"]
