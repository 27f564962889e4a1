"""Remake the embedded miniatures: `python -m vlbench.model.tiny [NAME ...]`.

Names are tokenizer, tower, eva_tower and language; without one it makes all, in that order. It
writes `manifest.json`: the hash of every file and the quality that was measured. Seeds are fixed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from vlbench.data.scene_world import VERSION

HERE = Path(__file__).parent
PARTS = ("tokenizer", "tower", "eva_tower", "language")
FOLDERS = ("language", "tower", "eva_tower")


def main(names: list[str]) -> int:
    """Make the named parts (all without a name), then write the manifest."""
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"unknown part {unknown[0]!r} (known: {', '.join(PARTS)})", file=sys.stderr)
        return 2
    quality = _recorded()
    for name in names or PARTS:
        quality[name] = _make(name)
    write_manifest(quality)
    return 0


def write_manifest(quality: dict[str, dict[str, object]]) -> None:
    """Record the files' hashes and the quality figures."""
    files = sorted(p for folder in FOLDERS for p in (HERE / folder).iterdir())
    manifest = {
        "command": "python -m vlbench.model.tiny",
        "world": VERSION,
        "storage": "float16",
        "quality": quality,
        "files": {
            p.relative_to(HERE).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in files
        },
    }
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    (HERE / "manifest.json").write_text(text, encoding="utf-8")


def _make(name: str) -> dict[str, object]:
    # Imported when needed: each part stands on libraries of its own.
    from vlbench.data.tokenizer import Tokenizer
    from vlbench.model.tiny import make_eva, make_language, make_tokenizer, make_tower

    if name == "tokenizer":
        return dict(make_tokenizer.make(HERE / "language"))
    tokenizer = Tokenizer.load(HERE / "language")
    if name == "tower":
        return dict(make_tower.make(HERE / "tower", tokenizer))
    if name == "eva_tower":
        return dict(make_eva.make(HERE / "eva_tower", HERE / "tower"))
    return dict(make_language.make(HERE / "language", tokenizer))


def _recorded() -> dict[str, dict[str, object]]:
    path = HERE / "manifest.json"
    if not path.is_file():
        return {}
    quality = json.loads(path.read_text(encoding="utf-8"))["quality"]
    assert isinstance(quality, dict)
    return quality


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
