"""What goes wrong while a person uses the page: hasty keys, bad files, votes that are not blind."""

# ruff: noqa: F811  (fixtures are imported, and named again where they are used)

from __future__ import annotations

import json

import pytest
from page_driver import (
    add_picture,
    ask,
    picture_bytes,
    scrolls_sideways,
    transfer_with,
    wait_for_answers,
)
from page_server import images_of, models, scripted_models, serve_page, votes
from test_page import arena, browser, chat, open_page, playwright, pytestmark

__all__ = ["arena", "browser", "chat", "models", "open_page", "pytestmark", "votes"]

PASTE_AND_ASK = """(transfer) => {
    document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: transfer}));
    document.querySelector("#composer").requestSubmit();
    document.querySelector("#composer").requestSubmit();
}"""


def test_a_question_waits_for_the_pictures_that_were_just_added(open_page, chat, models):
    page = open_page(chat)
    page.fill("#question", "what?")
    page.evaluate(PASTE_AND_ASK, transfer_with(page, "cat.png", picture_bytes()))
    assert wait_for_answers(page) == ["I am alpha, turn 1: what? seen "]
    assert len(images_of(models[0].engine.requests[-1])) == 1
    assert page.locator(".thumbnail").count() == 0
    page.fill("#question", "and this?")
    page.evaluate(PASTE_AND_ASK, transfer_with(page, "text.png", b"no picture"))
    playwright.expect(page.locator("#composer .note")).to_contain_text("text.png is no picture")
    assert page.input_value("#question") == "and this?" and page.locator(".turn").count() == 1
    files = [
        {"name": name, "mimeType": "image/png", "buffer": content}
        for name, content in (("a", b"a"), ("b", picture_bytes()), ("c", b"c"))
    ]
    page.set_input_files("#composer input[type=file]", files)
    playwright.expect(page.locator("#composer .note")).to_contain_text("a, c are no pictures")
    assert page.locator(".thumbnail").count() == 1


def test_a_picture_that_the_server_refuses_can_be_taken_away(open_page, chat):
    page, whole = open_page(chat), picture_bytes(kind="JPEG", width=640, height=640)
    add_picture(page, whole[: len(whole) // 2])  # the browser shows it, the server does not
    ask(page, "what?")
    wait_for_answers(page)
    playwright.expect(page.locator(".answer > .note")).to_contain_text("The server says")
    page.click("text=Edit")
    page.click(".editing .thumbnail")
    page.press(".editing textarea", "Enter")
    assert wait_for_answers(page) == ["I am alpha, turn 1: what?  "]
    assert page.locator(".picture").count() == 0


def test_escape_that_drops_a_composed_word_neither_stops_nor_leaves(open_page, chat):
    page = open_page(chat)
    ask(page, "slow")
    page.wait_for_selector(".words:has-text('one two')")
    escape = {"key": "Escape", "isComposing": True, "bubbles": True}
    page.dispatch_event("#question", "keydown", escape)
    assert page.inner_text("#composer button[type=submit]") == "Stop"
    page.click("text=Edit")
    page.dispatch_event(".editing textarea", "keydown", escape)
    assert page.is_visible(".editing textarea")
    page.keyboard.press("Escape")
    assert not page.is_visible(".editing textarea")
    page.keyboard.press("Escape")
    wait_for_answers(page)


def test_no_vote_once_the_names_were_seen(open_page, arena):
    page = open_page(arena)
    page.check("#blind input")
    page.context.set_offline(True)
    ask(page, "which?")
    wait_for_answers(page, 2)
    page.context.set_offline(False)
    for index in range(2):
        page.locator(".answer").nth(index).get_by_text("Retry").click()
        playwright.expect(page.locator(".answer > .words").nth(index)).to_contain_text("I am")
    wait_for_answers(page, 2)
    assert sorted(page.locator(".answer h3").all_inner_texts()) == ["alpha", "beta"]
    assert not page.is_visible(".vote .choices")


def test_leaving_asks_first_where_a_conversation_would_be_lost(open_page, arena):
    page, asked = open_page(arena, width=400), []
    page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    box = page.locator(".intro .box")
    assert box.evaluate("(e) => e.scrollWidth <= e.clientWidth")  # all columns, on a telephone
    page.reload()
    page.wait_for_selector(".intro table")
    ask(page, "\u05e9\u05dc\u05d5\u05dd?")
    wait_for_answers(page, 2)
    question = page.locator(".question")
    assert question.evaluate("(e) => getComputedStyle(e).direction") == "rtl"  # as Hebrew is
    page.reload()
    page.wait_for_selector(".turn")
    assert asked == []
    add_picture(page, picture_bytes() + bytes(6_000_000))  # more than a browser keeps
    ask(page, "and?")
    wait_for_answers(page, 2)
    page.reload()
    page.wait_for_selector(".intro table")
    assert asked == ["beforeunload"]
    ask(page, "slow")
    page.wait_for_selector(".words:has-text('one two')")
    page.reload()  # an answer that is coming would be cut
    page.wait_for_selector(".turn")
    assert asked == ["beforeunload"] * 2


def test_a_conversation_outlives_a_reload_until_a_new_one(open_page, arena, models):
    page = open_page(arena)
    ask(page, "first", with_picture=True)
    told = wait_for_answers(page, 2)
    ask(page, "full")
    wait_for_answers(page, 2)
    metrics = page.locator(".metrics").all_inner_texts()
    page.reload()
    page.wait_for_selector(".turn")
    assert page.locator(".question").all_inner_texts() == ["first", "full"]
    assert page.locator(".answer > .words").all_inner_texts() == [*told, "", ""]
    assert page.locator(".metrics").all_inner_texts() == metrics
    playwright.expect(page.locator(".answer > .note").last).to_contain_text("too much to do")
    ask(page, "third")
    assert wait_for_answers(page, 2)[0] == "I am alpha, turn 2: third seen "
    assert [image.size for image in images_of(models[0].engine.requests[-1])] == [(80, 40)]
    page.click(".answer >> nth=0 >> text=Heat map")
    page.wait_for_selector(".heat canvas")
    page.click("#new")
    page.wait_for_selector(".intro table")
    page.reload()
    page.wait_for_selector(".intro table")
    assert page.locator(".turn").count() == 0


def test_a_blind_answer_stays_blind_after_a_reload(open_page, arena, votes):
    page = open_page(arena)
    page.check("#blind input")
    ask(page, "which?")
    told = wait_for_answers(page, 2)
    page.reload()
    page.wait_for_selector(".turn")
    assert page.locator(".answer > .words").all_inner_texts() == told
    assert page.locator(".answer h3").all_inner_texts() == ["Answer A", "Answer B"]
    page.click("text=A is better")
    playwright.expect(page.locator(".vote")).to_contain_text("Your vote: A is better")
    assert json.loads(votes.read_text().splitlines()[-1])["answers"] == told
    page.reload()
    page.wait_for_selector(".turn")
    assert "alpha" in page.locator(".answer h3").all_inner_texts()


def test_long_names_long_questions_and_tall_pictures_leave_room_for_answers(open_page):
    long_name = "connector.name=qformer_connector.queries=16/seed0"
    with serve_page(scripted_models({long_name: "llava_mlp", "beta": "qformer"})) as address:
        page = open_page(address, width=400)
        box = page.locator(".intro .box")
        assert box.evaluate("(e) => e.scrollWidth <= e.clientWidth")  # no name is cut off
        add_picture(page, picture_bytes(40, 160))
        ask(page, "where?")
        wait_for_answers(page, 2)
        page.click(".answer >> nth=1 >> text=Heat map")
        page.wait_for_selector(".heat canvas")
        for selector in (".picture", ".heat"):
            shown = page.locator(selector).bounding_box()
            assert shown["height"] < 400  # of a window of 800
            assert shown["width"] / shown["height"] == pytest.approx(0.25, rel=0.1)
        for _ in range(5):
            add_picture(page, picture_bytes(40, 160))
        ask(page, "long" * 2000)
        wait_for_answers(page, 2)
        last = page.locator(".turn").last
        assert last.locator(".picture").count() == 5
        assert last.locator(".asked").bounding_box()["height"] < 700
        assert not scrolls_sideways(page)
