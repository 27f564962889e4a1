"""Small data sets in the layouts that their authors publish, and what LLaVA's JSON says of them.

Each function writes the annotation files of one mapping into a folder, a few records with the keys
that the files really have, and returns the LLaVA records of the same content.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from caption_layouts import (
    Record,
    llava,
    write_coco_captions,
    write_coco_cn,
    write_coco_karpathy,
    write_flickr30k,
    write_flickr30k_token,
    write_json,
    write_textcaps,
)
from PIL import Image

SHORT = "Answer the question using a single word or phrase."


def ten_answers(texts: str) -> list[Record]:
    return [
        {"answer": text, "answer_confidence": "yes", "answer_id": number}
        for number, text in enumerate(texts.split(","), start=1)
    ]


def write_vqav2(folder: Path) -> list[Record]:
    about = {"info": {"version": "2.0"}, "data_type": "mscoco", "data_subtype": "train2014"}
    annotations = [
        {
            "question_type": "what is this",
            "multiple_choice_answer": "net",
            "answers": ten_answers("net,net,mesh"),
            "image_id": 458752,
            "answer_type": "other",
            "question_id": 458752000,
        },
        {
            "question_type": "is the",
            "multiple_choice_answer": "yes",
            "answers": ten_answers("yes,no,yes"),
            "image_id": 9,
            "answer_type": "yes/no",
            "question_id": 9001,
        },
    ]
    questions = [  # in another order than the annotations
        {"image_id": 9, "question": "Is the café open?", "question_id": 9001},
        {"image_id": 458752, "question": "What is this behind him?", "question_id": 458752000},
    ]
    write_json(
        folder,
        "v2_mscoco_train2014_annotations.json",
        {**about, "annotations": annotations, "license": {"name": "CC"}},
    )
    write_json(
        folder,
        "v2_OpenEnded_mscoco_train2014_questions.json",
        {**about, "task_type": "Open-Ended", "questions": questions},
    )
    first = "train2014/COCO_train2014_000000458752.jpg"
    return [
        llava(first, ("What is this behind him?", "net"), prompt=SHORT, id="458752000"),
        llava(
            "train2014/COCO_train2014_000000000009.jpg",
            ("Is the café open?", "yes"),
            prompt=SHORT,
            id="9001",
        ),
    ]


def write_gqa(folder: Path) -> list[Record]:
    questions = {
        "02930152": {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
            "entailed": ["02930160"],
            "equivalent": ["02930152"],
            "question": "Is the sky dark?",
            "imageId": "2354786",
            "isBalanced": True,
            "groups": {"global": None, "local": "06-sky_dark"},
            "answer": "yes",
            "semanticStr": "select: sky (2486325)->verify color: dark [0]",
            "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {}},
            "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
            "fullAnswer": "Yes, the sky is dark.",
        },
        "07333408": {
            "question": "What is on the white wall?",
            "imageId": "n161313",
            "answer": "pipe",
            "fullAnswer": "The pipe is on the wall.",
        },
    }
    write_json(folder, "questions/train_balanced_questions.json", questions)
    return [
        llava("images/2354786.jpg", ("Is the sky dark?", "yes"), prompt=SHORT, id="02930152"),
        llava(
            "images/n161313.jpg",
            ("What is on the white wall?", "pipe"),
            prompt=SHORT,
            id="07333408",
        ),
    ]


def write_textvqa(folder: Path) -> list[Record]:
    record = {
        "question": "what is the brand of this camera?",
        "image_id": "003a8ae2ef43b901",
        "image_classes": ["Cassette deck", "Printer"],
        "flickr_original_url": "https://farm2.staticflickr.com/4_o.jpg",
        "flickr_300k_url": "https://farm2.staticflickr.com/4_o.jpg",
        "image_width": 1024,
        "image_height": 664,
        "answers": ["nous les gosses", "dakota", "dakota digital", "dakota", "clos culombu"],
        "question_tokens": ["what", "is", "the", "brand", "of", "this", "camera"],
        "question_id": 34602,
        "set_name": "train",
    }
    about = {"dataset_type": "train", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write_json(folder, "TextVQA_0.5.1_train.json", {**about, "data": [record]})
    asked = ("what is the brand of this camera?", "dakota")
    return [llava("train_images/003a8ae2ef43b901.jpg", asked, prompt=SHORT, id="34602")]


def write_ocr_vqa(folder: Path) -> list[Record]:
    book = {
        "imageURL": "http://ecx.images-amazon.com/images/I/61Y5cOdHJbL.jpg",
        "questions": ["Who wrote this book?", "What is the genre of this book?"],
        "answers": ["Sandra Boynton", "Calendars"],
        "title": "Mom's Family Wall Calendar 2016",
        "authorName": "Sandra Boynton",
        "genre": "Calendars",
    }
    other = {**book, "imageURL": "http://ecx.images-amazon.com/images/I/5.gif", "split": 1}
    books = {"761183272": {**book, "split": 1}, "1": {**book, "split": 2}, "140031996X": other}
    write_json(folder, "dataset.json", books)
    turns = list(zip(book["questions"], book["answers"], strict=True))
    return [
        llava("images/761183272.jpg", *turns, prompt=SHORT, id="761183272"),
        llava("images/140031996X.gif", *turns, prompt=SHORT, id="140031996X"),
    ]


def write_vizwiz(folder: Path) -> list[Record]:
    record = {
        "image": "VizWiz_train_00000001.jpg",
        "question": "Can you tell me what this medicine is please?",
        "answers": ten_answers("no,night time,unanswerable,night time"),
        "answer_type": "other",
        "answerable": 1,
    }
    write_json(folder, "Annotations/train.json", [record])
    hint = "When the provided information is insufficient, respond with 'Unanswerable'."
    asked = (f"{record['question']}\n{hint}", "night time")
    return [llava("train/VizWiz_train_00000001.jpg", asked, prompt=SHORT)]


def write_refcoco(folder: Path, name: str = "refcoco") -> list[Record]:
    picture = {
        "file_name": "COCO_train2014_000000581857.jpg",
        "height": 640,
        "width": 427,
        "id": 0,
        "original_id": 581857,
        "caption": "the lady with the blue shirt",
        "dataset_name": name,
        "tokens_negative": [[0, 28]],
    }
    annotation = {
        "area": 14863.6,
        "iscrowd": 0,
        "image_id": 0,
        "category_id": 1,
        "id": 0,
        "bbox": [103.93, 299.99, 134.22, 177.42],
        "tokens_positive": [[0, 28]],
        "original_id": 1719310,
    }
    write_json(
        folder,
        f"OpenSource/finetune_{name}_train.json",
        {"info": [], "licenses": [], "images": [picture], "annotations": [annotation]},
    )
    # padded to 640 x 640, with 106 pixels to the left
    asked = (
        "Please provide the bounding box coordinate of the region this sentence describes: "
        "the lady with the blue shirt.",
        "[0.33, 0.47, 0.54, 0.75]",
    )
    return [llava("train2014/COCO_train2014_000000581857.jpg", asked)]


def write_visual7w(folder: Path) -> list[Record]:
    def pair(number: int, kind: str, question: str, answer: str) -> Record:
        return {
            "answer": answer,
            "qa_id": number,
            "multiple_choices": ["One.", "Three.", "Six."],
            "image_id": 2,
            "question": question,
            "type": kind,
        }

    pairs = [
        pair(1, "how", "How many people are there?", "Two."),
        pair(2, "where", "Where is the bus?", "On the street."),
    ]
    images = [
        {"image_id": 2, "split": "train", "filename": "v7w_2.jpg", "qa_pairs": pairs},
        {"image_id": 3, "split": "train", "filename": "v7w_3.jpg", "qa_pairs": []},
        {"image_id": 4, "split": "test", "filename": "v7w_4.jpg", "qa_pairs": pairs},
    ]
    write_json(
        folder, "dataset_v7w_telling.json", {"dataset": "visual7w-telling", "images": images}
    )
    turns = [(one["question"], one["answer"]) for one in pairs]
    return [llava("images/v7w_2.jpg", *turns, prompt=SHORT)]


def write_image_data(folder: Path) -> None:
    base = "https://cs.stanford.edu/people/rak248"
    pictures = [
        {
            "image_id": number,
            "url": f"{base}/{part}/{number}.jpg",
            "width": 800,
            "height": 600,
            "coco_id": None,
            "flickr_id": None,
        }
        for number, part in ((2, "VG_100K"), (1, "VG_100K_2"))
    ]
    write_json(folder, "image_data.json", pictures)


def write_vg_qa(folder: Path) -> list[Record]:
    def pair(number: int) -> Record:
        return {
            "a_objects": [],
            "question": f"What is {number}?",
            "image_id": 1,
            "qa_id": 986768 + number,
            "answer": f"Number {number}.",
            "q_objects": [],
        }

    records = [
        {"id": 1, "qas": [pair(number) for number in range(20)]},
        {"id": 3, "qas": []},
        {"id": 2, "qas": [pair(7)]},
    ]
    write_json(folder, "question_answers.json", records)
    write_image_data(folder)
    turns = [(f"What is {number}?", f"Number {number}.") for number in range(0, 20, 2)]
    return [
        llava("VG_100K_2/1.jpg", *turns, prompt=SHORT, id="1"),
        llava("VG_100K/2.jpg", ("What is 7?", "Number 7."), prompt=SHORT, id="2"),
    ]


def write_vg_regions(folder: Path) -> list[Record]:
    regions = [
        {
            "region_id": 1382,
            "width": 82,
            "height": 139,
            "image_id": 1,
            "phrase": "the clock is green in colour",
            "y": 57,
            "x": 421,
        },
        {
            "region_id": 1383,
            "width": 182,
            "height": 338,
            "image_id": 1,
            "phrase": "shade is along the street ",
            "y": -4,
            "x": 650,
        },
    ]
    write_json(folder, "region_descriptions.json", [{"regions": regions, "id": 1}])
    write_image_data(folder)
    asked = "Please provide a short description for this region: "
    turns = [  # padded to 800 x 800, with 100 pixels above
        (f"{asked}[0.53, 0.2, 0.63, 0.37].", "the clock is green in colour"),
        (f"{asked}[0.81, 0.12, 1.0, 0.54].", "shade is along the street "),
    ]
    return [llava("VG_100K_2/1.jpg", *turns, id="1")]


LAYOUTS: dict[str, Callable[[Path], list[Record]]] = {
    "coco_captions": write_coco_captions,
    "coco_cn": write_coco_cn,
    "coco_karpathy": write_coco_karpathy,
    "flickr30k": write_flickr30k,
    "flickr30k_token": write_flickr30k_token,
    "gqa": write_gqa,
    "ocr_vqa": write_ocr_vqa,
    "refcoco": write_refcoco,
    "refcoco+": lambda folder: write_refcoco(folder, "refcoco+"),
    "refcocog": lambda folder: write_refcoco(folder, "refcocog"),
    "textcaps": write_textcaps,
    "textvqa": write_textvqa,
    "vg_qa": write_vg_qa,
    "vg_regions": write_vg_regions,
    "visual7w": write_visual7w,
    "vizwiz": write_vizwiz,
    "vqav2": write_vqav2,
}


def write_layout(name: str, folder: Path) -> list[Record]:
    """Write the annotation files and pictures of a mapping; return the records of LLaVA's JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    records = LAYOUTS[name](folder)
    for number, image in enumerate(dict.fromkeys(record["image"] for record in records)):
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (9, 8), (20 * number, 90, 40))
        picture.save(folder / image)
    return records
