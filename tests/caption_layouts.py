"""Small data sets of captions in their published layouts: see `annotation_layouts`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]
COCO_INFO = {"info": {"year": 2014, "contributor": "COCO"}, "licenses": [{"id": 1, "url": "x"}]}
CAPTION = "Provide a one-sentence caption for the provided image."


def write_json(folder: Path, name: str, value: Any) -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def llava(image: str, *turns: tuple[str, str], prompt: str = "", **more: Any) -> Record:
    """Return a LLaVA record; `prompt` stands behind the first question, as LLaVA-1.5 has it."""
    said = []
    for number, (asked, answered) in enumerate(turns):
        parts = [asked] if number else ["<image>", asked, prompt]
        said += [
            {"from": "human", "value": "\n".join(filter(None, parts))},
            {"from": "gpt", "value": answered},
        ]
    return {**more, "image": image, "conversations": said}


def write_textcaps(folder: Path) -> list[Record]:
    captions = ["A book titled Der Hobbit.", "A fantasy book in German."]
    records = [
        {
            "image_id": "0054c91397f2fe05",
            "image_classes": ["Book"],
            "flickr_original_url": "https://farm6.staticflickr.com/0_o.jpg",
            "image_width": 768,
            "image_height": 1024,
            "image_name": "0054c91397f2fe05",
            "image_path": "train/0054c91397f2fe05.jpg",
            "caption_id": number,
            "caption_str": caption,
            "caption_tokens": caption.split(),
            "reference_strs": captions,
            "reference_tokens": [text.split() for text in captions],
            "set_name": "train",
        }
        for number, caption in enumerate(captions)
    ]
    write_json(folder, "TextCaps_0.1_train.json", {"dataset_name": "textcaps", "data": records})
    image = "train_images/0054c91397f2fe05.jpg"
    return [llava(image, ("", caption), prompt=CAPTION) for caption in captions]


def coco_picture(number: int, file_name: str) -> Record:
    return {
        "license": 1,
        "file_name": file_name,
        "coco_url": f"http://images.cocodataset.org/train2014/{file_name}",
        "height": 480,
        "width": 640,
        "date_captured": "2013-11-14 16:28:13",
        "flickr_url": "http://farm4.staticflickr.com/3_z.jpg",
        "id": number,
    }


def write_coco_captions(folder: Path) -> list[Record]:
    pictures = [
        coco_picture(57870, "COCO_train2014_000000057870.jpg"),
        coco_picture(9, "COCO_train2014_000000000009.jpg"),
    ]
    annotations = [
        {"image_id": 9, "id": 48, "caption": "A tray of food, à la carte."},
        {"image_id": 57870, "id": 49, "caption": "A restaurant has modern wooden tables."},
        {"image_id": 9, "id": 50, "caption": "Broccoli and bread on a tray. "},
    ]
    write_json(
        folder,
        "annotations/captions_train2014.json",
        {**COCO_INFO, "images": pictures, "annotations": annotations},
    )
    return [
        llava(
            f"train2014/COCO_train2014_{one['image_id']:012}.jpg",
            ("", one["caption"]),
            prompt=CAPTION,
        )
        for one in annotations
    ]


def karpathy(*pictures: tuple[Record, str, list[str]]) -> list[Record]:
    return [
        {
            **about,
            "imgid": number,
            "sentids": list(range(len(captions))),
            "sentences": [
                {"tokens": text.split(), "raw": text, "imgid": number, "sentid": place}
                for place, text in enumerate(captions)
            ],
            "split": split,
        }
        for number, (about, split, captions) in enumerate(pictures)
    ]


def write_coco_karpathy(folder: Path) -> list[Record]:
    pictures = karpathy(
        ({"filepath": "val2014", "filename": "COCO_val2014_1.jpg", "cocoid": 1}, "test", ["A"]),
        ({"filepath": "val2014", "filename": "COCO_val2014_2.jpg"}, "restval", ["B", "C"]),
        ({"filepath": "train2014", "filename": "COCO_train2014_3.jpg"}, "train", ["D"]),
    )
    write_json(folder, "dataset_coco.json", {"images": pictures, "dataset": "coco"})
    return [
        llava("val2014/COCO_val2014_2.jpg", ("", "B"), prompt=CAPTION),
        llava("val2014/COCO_val2014_2.jpg", ("", "C"), prompt=CAPTION),
        llava("train2014/COCO_train2014_3.jpg", ("", "D"), prompt=CAPTION),
    ]


def write_flickr30k(folder: Path) -> list[Record]:
    captions = ["Two young guys with shaggy hair look at their hands.", "Two men in green shirts."]
    pictures = karpathy(
        ({"filename": "1000092795.jpg"}, "train", captions), ({"filename": "7.jpg"}, "val", ["x"])
    )
    write_json(folder, "dataset_flickr30k.json", {"images": pictures, "dataset": "flickr30k"})
    image = "flickr30k-images/1000092795.jpg"
    return [llava(image, ("", caption), prompt=CAPTION) for caption in captions]


def write_flickr30k_token(folder: Path) -> list[Record]:
    captions = ["Two guys , #1 and 2 , outside .", "Two men in green shirts ."]
    lines = [f"1000092795.jpg#{number}\t{text}" for number, text in enumerate(captions)]
    (folder / "results_20130124.token").write_text("\n".join(lines) + "\n")
    image = "flickr30k-images/1000092795.jpg"
    return [llava(image, ("", caption), prompt=CAPTION) for caption in captions]


def write_coco_cn(folder: Path) -> list[Record]:
    lines = [
        "COCO_val2014_000000000042#0\t一只狗 躺在鞋子里。",
        "COCO_train2014_000000520978#1\t猫",
    ]
    file = folder / "imageid.human-written-caption.txt"
    file.write_text("".join(f"{line}\r\n" for line in lines), encoding="utf-8")
    prompt = "请用一句话描述这张图片。"
    return [
        llava("val2014/COCO_val2014_000000000042.jpg", ("", "一只狗 躺在鞋子里。"), prompt=prompt),
        llava("train2014/COCO_train2014_000000520978.jpg", ("", "猫"), prompt=prompt),
    ]
