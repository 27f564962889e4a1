"""Load a full-size Yi-VL-6B and ask it one question: how much memory does that take?

    python benchmarks/load_6b.py [FOLDER]

Writes a model in the released layout with random bf16 weights (13 GB, several shards) into FOLDER,
by default a temporary one that is removed at the end, loads it in a process of its own on the CPU,
and answers one question about one photograph. The peak is VmHWM, the most memory that the process
ever had resident, libraries and mapped files included; it must stay below the loaded weights
+ 2.5 GB.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIMIT = 2.5e9  # bytes beside the loaded weights
PHOTO = Path(__file__).parents[1] / "tests/goldens/photos/cats.jpg"
NAME = "clip-vit-H-14-laion2B-s32B-b79K-yi-vl-6B-448"
ENCODER = {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "image_size": 448,
    "intermediate_size": 5120,
    "layer_norm_eps": 1e-5,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 32,
    "patch_size": 14,
}
LLAVA = {
    "image_aspect_ratio": "pad",
    "mm_hidden_size": ENCODER["hidden_size"],
    "mm_projector_type": "mlp2x_gelu_Norm",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": f"./vit/{NAME}",
    "model_type": "llava",
    "torch_dtype": "bfloat16",
}
PROCESSOR = {
    "crop_size": {"height": 448, "width": 448},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": {"shortest_edge": 448},
}


def main() -> int:
    """Write the model, measure in a process of its own, print the figures."""
    if len(sys.argv) > 1:
        return measure_loading(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        return measure_loading(Path(folder))


def measure_loading(folder: Path) -> int:
    """Write the model into `folder` unless it is there; load and ask it; return the exit code."""
    if not (folder / "config.json").is_file():
        began = time.monotonic()
        write_model(folder)
        print(f"written in {time.monotonic() - began:.0f} s")
    files = [p for p in folder.rglob("*") if p.suffix == ".safetensors"]
    print(f"{len(files)} files of weights, {sum(p.stat().st_size for p in files) / 1e9:.2f} GB")
    child = [sys.executable, "-c", ASK_SCRIPT, str(folder), str(PHOTO)]
    figures = json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE).stdout)
    for name, value in figures.items():
        print(f"{name}: {value / 1e9:.2f} GB" if "bytes" in name else f"{name}: {value}")
    over = figures["peak bytes after loading"] - figures["weights, bytes"]
    print(f"peak while loading, beside the weights: {over / 1e9:.2f} GB (limit {LIMIT / 1e9} GB)")
    over = figures["peak bytes after the answer"] - figures["weights, bytes"]
    print(f"peak with the answer, beside the weights: {over / 1e9:.2f} GB (limit {LIMIT / 1e9} GB)")
    return 0 if over <= LIMIT else 1


ASK_SCRIPT = """
import json, sys, time
import vlbench

def peak():
    lines = open("/proc/self/status").read().split("\n")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

began = time.monotonic()
vlm = vlbench.load(sys.argv[1], dtype="bf16", device="cpu")
loaded = time.monotonic()
figures = {
    "weights, bytes": sum(p.numel() * p.element_size() for p in vlm.parameters()),
    "peak bytes after loading": peak(),
    "seconds to load": round(loaded - began, 1),
}
content = [{"type": "image", "image": sys.argv[2]}, {"type": "text", "text": "What is this?"}]
answer = vlm.chat([{"role": "user", "content": content}], max_new_tokens=8)
figures["seconds to answer (8 tokens)"] = round(time.monotonic() - loaded, 1)
figures["peak bytes after the answer"] = peak()
figures["answer (of random weights)"] = answer
print(json.dumps(figures))
"""


def write_model(folder: Path) -> None:
    """Write a Yi-VL-6B with random weights, in the released layout, into `folder`."""
    import torch

    from vlbench.model.language_model import (
        TINY_LANGUAGE_FOLDER,
        build_empty_language,
        named_language_config,
    )
    from vlbench.model.weights import clip_layouts
    from vlbench.model.weights.tensor_writer import write_tensors

    language = build_empty_language(named_language_config("yi-6b"))
    main = {name: list(tensor.shape) for name, tensor in language.state_dict().items()}
    width = language.config.hidden_size
    layers = {"0": [width, ENCODER["hidden_size"]], "1": [width], "3": [width, width], "4": [width]}
    for number, shape in layers.items():
        main[f"model.mm_projector.{number}.weight"] = shape
        main[f"model.mm_projector.{number}.bias"] = [width]
    with torch.device("meta"):
        visual = clip_layouts.to_hf_state_dict(clip_layouts.build_clip_vit(ENCODER))
    encoder = folder / "vit" / NAME
    encoder.mkdir(parents=True)
    write_tensors(random_tensors(main), folder)
    shapes = {f"vision_model.{name}": list(tensor.shape) for name, tensor in visual.items()}
    write_tensors(random_tensors(shapes), encoder)
    rope = {"rope_parameters": None, "rope_theta": 5000000.0}
    for file, value in (
        (folder / "config.json", {**language.config.to_dict(), **rope, **LLAVA}),
        (encoder / "config.json", ENCODER),
        (encoder / "preprocessor_config.json", PROCESSOR),
    ):
        file.write_text(json.dumps(value, indent=2))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY_LANGUAGE_FOLDER / name).read_bytes())


def random_tensors(shapes: dict[str, list[int]]) -> Iterator[tuple[str, Any]]:
    """Give a random bf16 tensor of each shape, one by one; norms are near one."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        yield name, tensor + 1 if "norm" in name and name.endswith("weight") else tensor


if __name__ == "__main__":
    sys.exit(main())
