"""The commands that README.md, docs/ and the recipes' comments tell people to type."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PLACES = ("README.md", "docs/*.md", "docs/*.sh", "recipes/*.yaml", "recipes/size/*.yaml")
STARTS = r"(?:python -m vlbench|vlbench|sbatch|torchrun|lmms-eval)"
INDENTED = re.compile(rf"^(?:#? {{2,5}}|# )(?:.*&& )?({STARTS} \S.*)$", re.MULTILINE)
QUOTED = re.compile(rf"`({STARTS} [^`]*?\S)`")
CODE = re.compile(r"^ {4}.*(vlbench\.load\([^)]*\))", re.MULTILINE)
REAL = re.compile(
    r"size=(6b|34b)|01-ai/|Yi-VL|eval .*tasks?[= ]c?mmmu"
    r"|vision\.weights=|connector\.text=|init=\S+\.(pth|pt|bin)"
)
"""What names a real size, a hub id, a tag, or a file of released weights."""


def documented_commands() -> dict[str, str]:
    """Return every command that names something real, with the file that tells it."""
    found = {}
    for pattern in PLACES:
        for file in sorted(ROOT.glob(pattern)):
            text = re.sub(r" *\\\n[ #]*", " ", file.read_text(encoding="utf-8"))
            for form in (INDENTED, QUOTED, CODE):
                for told in form.findall(text):
                    command = " ".join(re.sub(r"\s# .*$", "", told).split())
                    if REAL.search(command):
                        found[command] = str(file.relative_to(ROOT))
    return found


if __name__ == "__main__":
    for command, file in documented_commands().items():
        print(f"{file}: {command}")
