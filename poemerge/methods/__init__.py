"""Merge methods: one file each; whatever lies in this folder is in the table."""

import importlib
import pkgutil

from poemerge.errors import SettingError
from poemerge.method import METHODS, Method
from poemerge.settings import nearest

__all__ = ["METHODS", "find"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def find(name: str) -> Method:
    """The method of that name.

    Raises:
        SettingError: there is none; the message names the nearest.
    """
    if name not in METHODS:
        raise SettingError(
            f"Unknown method {name!r}{nearest(name, METHODS)}; `poemerge methods` lists them all."
        )
    return METHODS[name]
