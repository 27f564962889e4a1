"""Remake the embedded miniatures: `python -m vlbench.miniatures [NAME ...]`.

Names are tokenizer, vision_encoder, eva_vision_encoder and language; without one it makes
all, in that order. It writes `manifest.json`: the hash of every file and the quality that was
measured. Seeds are fixed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from vlbench.data.scene_world import SCENE_VERSION

MINIATURES_FOLDER = Path(__file__).parent
PART_NAMES = ("tokenizer", "vision_encoder", "eva_vision_encoder", "language")
PART_FOLDERS = ("language", "vision_encoder", "eva_vision_encoder")


def make_miniatures(names: list[str]) -> int:
    """Make the named parts (all without a name), then write the manifest."""
    unknown = [name for name in names if name not in PART_NAMES]
    if unknown:
        print(f"unknown part {unknown[0]!r} (known: {', '.join(PART_NAMES)})", file=sys.stderr)
        return 2
    quality = _recorded_quality()
    for name in names or PART_NAMES:
        quality[name] = _make_part(name)
    write_manifest(quality)
    return 0


def write_manifest(quality: dict[str, dict[str, object]]) -> None:
    """Record the files' hashes and the quality figures."""
    files = sorted(p for folder in PART_FOLDERS for p in (MINIATURES_FOLDER / folder).iterdir())
    manifest = {
        "command": "python -m vlbench.miniatures",
        "world": SCENE_VERSION,
        "storage": "float16",
        "quality": quality,
        "files": {
            p.relative_to(MINIATURES_FOLDER).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in files
        },
    }
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    (MINIATURES_FOLDER / "manifest.json").write_text(text, encoding="utf-8")


def _make_part(name: str) -> dict[str, object]:
    # Imported when needed: each part stands on libraries of its own.
    from vlbench.data.tokenizer import Tokenizer
    from vlbench.miniatures import (
        make_eva,
        make_language_model,
        make_tokenizer,
        make_vision_encoder,
    )

    if name == "tokenizer":
        return dict(make_tokenizer.create_tokenizer(MINIATURES_FOLDER / "language"))
    tokenizer = Tokenizer.load(MINIATURES_FOLDER / "language")
    if name == "vision_encoder":
        return dict(
            make_vision_encoder.create_vision_encoder(
                MINIATURES_FOLDER / "vision_encoder", tokenizer
            )
        )
    if name == "eva_vision_encoder":
        return dict(
            make_eva.create_eva_encoder(
                MINIATURES_FOLDER / "eva_vision_encoder", MINIATURES_FOLDER / "vision_encoder"
            )
        )
    return dict(
        make_language_model.create_language_model(MINIATURES_FOLDER / "language", tokenizer)
    )


def _recorded_quality() -> dict[str, dict[str, object]]:
    path = MINIATURES_FOLDER / "manifest.json"
    if not path.is_file():
        return {}
    quality = json.loads(path.read_text(encoding="utf-8"))["quality"]
    assert isinstance(quality, dict)
    return quality


if __name__ == "__main__":
    raise SystemExit(make_miniatures(sys.argv[1:]))
