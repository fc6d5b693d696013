"""`python -m flows.reference` writes the pages."""

from flows.reference import FOLDER, pages

FOLDER.mkdir(exist_ok=True)
for name, page in pages().items():
    (FOLDER / name).write_text(page, encoding="utf-8")
