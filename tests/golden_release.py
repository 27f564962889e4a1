"""The released layout in small: the golden checkpoint, its cases, and variations of both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlbench.model.weights.tensor_files import read_tensors, weight_files

GOLDEN = Path(__file__).parent / "goldens/yi_vl/tiny_a"
CHECKPOINT = GOLDEN / "checkpoint"
ENCODER_FOLDER = "vit/clip-vit-H-14-laion2B-s32B-b79K-yi-vl-6B-448"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
TOLERANCE = CASES["tolerance"]
ROLES = {"human": "user", "assistant": "assistant"}


def load_records() -> dict[str, Tensor]:
    """Return the tensors of all cases as `case.name`."""
    return {
        f"{file.stem}.{name}": tensor
        for file in sorted((GOLDEN / "cases").glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def case_messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the conversation of a case in the Hugging Face chat format."""
    images = iter(record["images"])
    result = []
    for turn in record["conversation"]:
        text = turn["content"]
        shown = text.count("<image_placeholder>")
        content = [
            {"type": "image", "image": GOLDEN / "images" / next(images)} for _ in range(shown)
        ]
        text = text.replace("<image_placeholder>", "")
        content.append({"type": "text", "text": text.removeprefix("\n") if shown else text})
        result.append({"role": ROLES[turn["role"]], "content": content})
    return result


def copy_checkpoint(folder: Path) -> Path:
    """Copy the golden checkpoint to `folder`, to be changed there."""
    return Path(shutil.copytree(CHECKPOINT, folder))


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors in the weight files of a folder."""
    return {name: tensor for file in weight_files(folder) for name, tensor in read_tensors(file)}


def rewrite_weights(
    folder: Path, change: Callable[[dict[str, Tensor]], None], kind: str = "bin"
) -> None:
    """Write the weights of a folder anew after `change`, in two .bin shards or one safetensors."""
    state = load_tensors(folder)
    change(state)
    for file in weight_files(folder):
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    if kind == "safetensors":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(state)
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: state[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def make_plain_llava(folder: Path, kind: str = "bin", tokens: int = 0, **config: Any) -> Path:
    """Copy the golden with LLaVA-1.5's projector, and `tokens` added tokens, `<extra_0>` onwards.

    `config` are further changes of config.json.
    """
    copy_checkpoint(folder)
    edit_json(
        folder / "config.json", mm_projector_type="mlp2x_gelu", vocab_size=1600 + tokens, **config
    )
    if tokens:
        added = {f"<extra_{number}>": 1600 + number for number in range(tokens)}
        (folder / "added_tokens.json").write_text(json.dumps(added))
    noise = torch.Generator().manual_seed(0)

    def replace_projector(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if "mm_projector" in name]:
            del state[name]
        for number, width in (("0", 80), ("2", 64)):
            start = f"model.mm_projector.{number}"
            weight = torch.randn(64, width, generator=noise) / width**0.5
            state[f"{start}.weight"] = weight.bfloat16()
            state[f"{start}.bias"] = torch.randn(64, generator=noise).bfloat16() / 8
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            more = torch.randn(tokens, 64, generator=noise).bfloat16() / 8
            state[name] = torch.cat([state[name], more])

    rewrite_weights(folder, replace_projector, kind)
    return folder
