"""The published data of Yi-VL's three stages in their real layouts, a few records of each source.

What `recipes/data/yi_vl_stage1.yaml` to `yi_vl_stage3.yaml` need is written below `data`.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from annotation_layouts import write_layout
from PIL import Image

STAGES = {"align_224": "yi_vl_stage1", "align_448": "yi_vl_stage2", "chat": "yi_vl_stage3"}
WORDS = [
    *(f"stages.{stage}.data.mix={mixture}" for stage, mixture in STAGES.items()),
    "stages.align_448.sample_format=chat",
]
FOLDERS = {
    "flickr30k_token": "flickr30k",
    "gqa": "gqa",
    "ocr_vqa": "ocr_vqa",
    "refcoco": "refcoco",
    "textcaps": "textcaps",
    "vg_qa": "visual_genome",
    "vg_regions": "visual_genome",
    "visual7w": "visual7w",
    "vizwiz": "vizwiz",
    "vqav2": "vqav2",
}


def write_data(folder: Path) -> None:
    """Write everything that the three stages need into `folder`/data."""
    for name, place in FOLDERS.items():
        write_layout(name, folder / "data" / place)
    write_shards(folder / "data/laion400m", shard_count=3, sample_count=6)
    write_shards(folder / "data/laion_gpt4v", shard_count=1, sample_count=4)
    cc3m = ["GCC_train_000000000.jpg", "GCC_train_000000001.jpg"]
    coco = ["000000033471.jpg", "000000052846.jpg"]
    cllava, llavar = folder / "data/cllava", folder / "data/llavar"
    write_llava(cllava / "LLaVA-CC3M-Pretrain-595K/chat-translated.json", cllava / "cc3m", cc3m)
    instruct = cllava / "LLaVA-Instruct-150K/translated/llava_instruct_150k.json"
    write_llava(instruct, folder / "data/coco/train2017", coco)
    write_llava(llavar / "chat_llavar.json", llavar / "cc3m", [*cc3m, "9_0.jpg"])


def write_shards(folder: Path, shard_count: int, sample_count: int) -> None:
    """Write tar files as img2dataset does: KEY.jpg, KEY.txt and KEY.json."""
    folder.mkdir(parents=True)
    for shard in range(shard_count):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(sample_count):
                key = f"{shard:05d}{number:04d}"
                caption = f"picture {number} of {folder.name}, shard {shard}"
                about = {"caption": caption, "url": f"http://x/{key}", "key": key, "width": 9}
                image = io.BytesIO()
                Image.new("RGB", (9, 8), (40 * number, 80 * shard, 120)).save(image, "JPEG")
                members = {
                    "jpg": image.getvalue(),
                    "txt": caption.encode(),
                    "json": json.dumps(about).encode(),
                }
                for suffix, data in members.items():
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def write_llava(file: Path, images: Path, names: list[str]) -> None:
    """Write a LLaVA file with a conversation about each picture, and the pictures."""
    images.mkdir(parents=True, exist_ok=True)
    records = []
    for number, name in enumerate(names):
        Image.new("RGB", (8, 9), (200, 60 * number, 90)).save(images / name)
        turns = [{"from": "human", "value": "图片里有什么？\n<image>"}]
        turns += [{"from": "gpt", "value": f"一张图片，编号 {number}。"}]
        records.append({"id": name[:-4], "image": name, "conversations": turns})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
