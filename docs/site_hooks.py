"""What `mkdocs build` puts into the pages: sections of README.md, notebooks, the recipe keys.

README.md is the one source: a line `{{ README: Title }}` of a page becomes that section of it,
`{{ notebook: FILE }}` the cells of a notebook beside the page without their title, and
`{{ recipe keys }}` what `fit --help` prints.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION_MARK = re.compile(r"^\{\{ README: (.+) \}\}$", re.MULTILINE)
NOTEBOOK_MARK = re.compile(r"^\{\{ notebook: (.+) \}\}$", re.MULTILINE)
KEYS_MARK = "{{ recipe keys }}"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the text of a page with its marks replaced; mkdocs calls this for each page."""
    source = str(page.file.src_uri)
    markdown = SECTION_MARK.sub(lambda mark: readme_section(mark[1], source), markdown)
    markdown = NOTEBOOK_MARK.sub(
        lambda mark: notebook_text((ROOT / "docs" / source).with_name(mark[1])), markdown
    )
    if KEYS_MARK in markdown:
        from vlbench.command_dispatch import verb_help

        markdown = markdown.replace(KEYS_MARK, f"```text\n{verb_help('fit')}\n```")
    return markdown


def readme_section(title: str, source: str) -> str:
    """Return the text under a heading of README.md, its links seen from the page `source`.

    Raises a KeyError for a heading that is not there.
    """
    parts = re.split(r"^## (.+)\n", README, flags=re.MULTILINE)
    text = dict(zip(parts[1::2], parts[2::2], strict=True))[title]
    text = text.strip("\n")  # and no blanks: a first line may be code
    text = re.sub(r"^###", "##", text, flags=re.MULTILINE)
    return re.sub(r"\]\(([\w./-]+\.md)", lambda link: f"]({_page_of(link[1], source)}", text)


def notebook_text(file: Path) -> str:
    """Return the cells of a notebook as Markdown, without the heading of the whole."""
    texts = []
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        texts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    return re.sub(r"\A# .*\n", "", "\n\n".join(texts))


def _page_of(file: str, source: str) -> str:
    """Return the page that shows a file of the repository, relative to the page `source`."""
    page = file.removeprefix("docs/") if file.startswith("docs/") else "reference/speed.md"
    return os.path.relpath(page, PurePosixPath(source).parent).replace(os.sep, "/")
