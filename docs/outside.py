"""Hooks of mkdocs.yml: files of the repository that pages link to are pages of the site too.

On a forge a link may lead anywhere in the repository, and the site has docs/ alone. So what is
linked outside of it, and what is linked there in turn, goes below `repository/`. A link to a folder
becomes text.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ELSEWHERE = "repository"
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".json": "json"}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the files outside of docs/ that are linked, however many links away."""
    todo = [DOCS / file.src_uri for file in files.documentation_pages()]
    for page in todo:
        for _, link, _ in LINK.findall(page.read_text(encoding="utf-8")):
            target = (page.parent / link).resolve()
            if target.is_file() and not target.is_relative_to(DOCS) and target not in todo:
                todo.append(target)
                files.append(File.generated(config, _place(target), content=_text(target)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Point every link to where its target lies in the site."""
    here = _origin(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        text, link, anchor = match.groups(default="")
        target = (here.parent / link).resolve()
        if target.is_dir():
            return text
        if not target.is_file():
            return match[0]
        place = os.path.relpath(_place(target), Path(page.file.src_uri).parent)
        return f"[{text}]({place}{anchor})"

    return LINK.sub(moved, markdown)


def _place(target: Path) -> str:
    """Where a file of the repository lies in the site."""
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    page = "" if target.suffix == ".md" else ".md"
    return f"{ELSEWHERE}/{target.relative_to(ROOT).as_posix()}{page}"


def _origin(place: str) -> Path:
    """The inverse of `_place`, for pages that have links."""
    first, _, rest = place.partition("/")
    return ROOT / rest if first == ELSEWHERE else DOCS / place


def _text(file: Path) -> str:
    """A page as it is; code in a block that nothing in it can close."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return text
    return f"# {file.name}\n\n~~~~~{LANGUAGES.get(file.suffix, 'text')}\n{text}~~~~~\n"
