"""`vlm.ask`: the answer of `chat`, which a notebook shows with its question and images."""

from __future__ import annotations

import base64
import io
import re

import pytest
from golden_release import CHECKPOINT
from PIL import Image

import vlbench
from vlbench.errors import UserError
from vlbench.model.shown_answer import THUMBNAIL_SIDE, ShownAnswer


@pytest.fixture(scope="module")
def vlm():
    return vlbench.load(CHECKPOINT, dtype="float32", device="cpu")


def test_it_is_what_chat_says_of_files_and_images_in_memory(vlm, tmp_path):
    picture = Image.new("RGB", (300, 600), "red")
    picture.save(tmp_path / "red.png")
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]
    said = vlm.chat([{"role": "user", "content": parts}], max_new_tokens=6)
    for image in (picture, tmp_path / "red.png", str(tmp_path / "red.png"), [picture]):
        answer = vlm.ask(image, "What?", max_new_tokens=6)
        assert str(answer) == answer.text == said and len(answer.images) == 1
    text = vlm.chat([{"role": "user", "content": "What?"}], max_new_tokens=6)
    assert str(vlm.ask(None, "What?", max_new_tokens=6)) == text
    assert len(vlm.ask([picture, picture], "What?", max_new_tokens=2).images) == 2


@pytest.mark.parametrize(
    ("images", "said"), [("no.png", "no.png"), ("https://x/y.png", "is a URL"), ([3], "a part is")]
)
def test_what_is_no_image_is_refused_in_a_line(images, said, vlm):
    with pytest.raises(UserError, match=said):
        vlm.ask(images, "What?")


def test_a_page_has_thumbnails_and_no_tags_of_texts():
    images = (Image.new("RGB", (600, 300), "blue"), Image.new("RGB", (8, 8)))
    answer = ShownAnswer("<b>What?</b>", 'A "cat" & <img src=x> \ud800', images)
    page = answer._repr_html_()
    assert "&lt;b&gt;What?&lt;/b&gt;" in page and "&lt;img src=x&gt;" in page and "&amp;" in page
    page.encode("utf-8")
    data = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="image">', page)
    shown = [Image.open(io.BytesIO(base64.b64decode(one))) for one in data]
    assert [one.size for one in shown] == [(THUMBNAIL_SIDE, THUMBNAIL_SIDE // 2), (8, 8)]
    assert images[0].size == (600, 300) and "Image" not in repr(answer)
