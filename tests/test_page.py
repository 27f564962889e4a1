"""The web page of `serve` in a real browser: a chat with one model, and several side by side."""

# ruff: noqa: F811  (fixtures are imported, and named again where they are used)

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from page_driver import (
    WAIT,
    add_picture,
    ask,
    picture_bytes,
    scrolls_sideways,
    tab,
    transfer_with,
    wait_for_answers,
)
from page_server import ScriptedEngine, images_of, models, serve_page, votes
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
__all__ = ["models", "votes"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]


@pytest.fixture(scope="module")
def arena(models, votes) -> Iterator[str]:
    with serve_page(models, votes) as address:
        yield address


@pytest.fixture(scope="module")
def chat(models) -> Iterator[str]:
    with serve_page(models[:1]) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        # no sandbox, as tests may run as root in a container
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Open the page; at the end nothing was complained of, and no other host was asked."""
    contexts, complaints, hosts = [], [], set()

    def on_console(message: Any) -> None:
        # the browser tells of each failed request; what the page makes of it is tested
        if message.type in ("error", "warning") and "Failed to load" not in message.text:
            complaints.append(message.text)

    def open_at(address: str, width: int = 1200, locale: str = "en-US", **options: Any):
        size = {"width": width, "height": 800}
        context = browser.new_context(viewport=size, locale=locale, **options)
        contexts.append(context)
        context.set_default_timeout(WAIT)
        page = context.new_page()
        page.on("console", on_console)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        page.goto(address)
        page.wait_for_selector(".intro table, dialog[open]")
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert complaints == []
    assert all(host.startswith("127.0.0.1:") for host in hosts if host), hosts


def engine_of(models, index: int = 0) -> ScriptedEngine:
    return models[index].engine


def test_a_dropped_picture_is_asked_about_and_the_answer_streams(open_page, chat, models):
    page, content = open_page(chat), picture_bytes()
    transfer = transfer_with(page, "cat.png", content)
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    page.wait_for_selector(".thumbnail")
    words = " ".join(map(str, range(40)))
    ask(page, words)
    page.wait_for_selector(".answer.coming .words:has-text('1 2 3')")
    assert not page.is_visible(".metrics")
    assert wait_for_answers(page) == [f"I am alpha, turn 1: {words} seen "]
    assert re.match(r"[\d.]+.s · 16.visual.tokens · [\d.]+.MFLOPs · ", page.inner_text(".metrics"))
    sent = images_of(engine_of(models).requests[-1])
    assert [image.size for image in sent] == [(80, 40)]
    assert page.get_attribute(".words", "aria-live") == "polite"


def test_a_pasted_picture_and_a_file_that_is_none(open_page, chat):
    page = open_page(chat)
    for name, content in (("cat.png", picture_bytes()), ("<b>no</b>.png", b"no picture")):
        page.evaluate(
            """(transfer) => document.dispatchEvent(
                new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true}))""",
            transfer_with(page, name, content),
        )
        page.wait_for_selector(".thumbnail")
    playwright.expect(page.locator("#composer .note")).to_contain_text(
        "<b>no</b>.png is no picture"
    )
    assert page.locator(".thumbnail").count() == 1
    page.click(".thumbnail")
    assert page.locator(".thumbnail").count() == 0


def test_a_turned_photograph_is_sent_upright(open_page, chat, models):
    exif = Image.Exif()
    exif[0x0112] = 6
    page = open_page(chat)
    add_picture(page, picture_bytes(kind="JPEG", exif=exif))
    ask(page, "upright?")
    wait_for_answers(page)
    assert images_of(engine_of(models).requests[-1])[0].size == (40, 80)


def test_stop_then_retry_with_the_next_seed(open_page, chat, models):
    page = open_page(chat)
    ask(page, "slow")
    page.wait_for_selector(".words:has-text('one two')")
    assert page.inner_text("#composer button[type=submit]") == "Stop"
    page.keyboard.press("Escape")
    playwright.expect(page.locator(".note").first).to_have_text("Stopped.")
    assert page.inner_text(".words").startswith("one two")
    page.click("text=Retry")
    page.wait_for_selector(".answer.coming .words:has-text('one two')")
    first, second = engine_of(models).requests[-2:]
    assert second.seed == first.seed + 1
    page.click("#composer button[type=submit]")
    wait_for_answers(page)
    assert page.inner_text("#composer button[type=submit]") == "Ask"


def test_an_edited_turn_cuts_the_conversation(open_page, chat, models):
    page = open_page(chat)
    ask(page, "first", with_picture=True)
    assert wait_for_answers(page) == ["I am alpha, turn 1: first seen "]
    ask(page, "second")
    assert wait_for_answers(page) == ["I am alpha, turn 2: second seen "]
    assert page.locator("text=Retry >> visible=true").count() == 1  # of the last turn alone
    page.click(".turn >> nth=0 >> text=Edit")
    page.fill(".editing textarea", "other")
    page.press(".editing textarea", "Enter")
    assert wait_for_answers(page) == ["I am alpha, turn 1: other seen "]
    assert page.locator(".turn").count() == 1
    assert len(engine_of(models).requests[-1].messages) == 1


def test_settings_are_sent_and_remembered(open_page, chat, models):
    page = open_page(chat)
    page.click("#open-settings")
    for name, value in (("maxTokens", "7"), ("temperature", "0.5"), ("topP", "0.9"), ("seed", "3")):
        page.fill(f"#settings input[name={name}]", value)
    page.fill("#settings input[name=topP]", "2")
    page.click("#settings .primary")
    assert page.is_visible("#settings")  # 2 is out of range
    page.fill("#settings input[name=topP]", "0.9")
    page.click("#settings .primary")
    page.reload()
    page.wait_for_selector(".intro table")
    ask(page, "drawn")
    wait_for_answers(page)
    sent = engine_of(models).requests[-1]
    assert (sent.max_new_tokens, sent.temperature, sent.top_p, sent.seed) == (7, 0.5, 0.9, 3)


def test_the_keyboard_alone_is_enough(open_page, arena):
    page = open_page(arena)
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    # Enter that ends a word of an input method is no question yet
    page.dispatch_event("#question", "keydown", {"key": "Enter", "isComposing": True})
    assert page.locator(".turn").count() == 0
    page.keyboard.press("Enter")
    wait_for_answers(page, 2)
    assert page.inner_text(".question") == "one\ntwo"
    assert page.evaluate("document.activeElement.id") == "question"
    reached = [tab(page)]
    while reached[-1] != "Go to the question":
        reached.append(tab(page))
    order = ["Go to the question", "alpha", "beta", "New", "Settings", "Edit", "Retry"]
    order += ["Add a picture", "Question", "Ask"]
    told = [reached.pop()]
    while told[-1] != order[-1]:
        told.append(tab(page))
        if told[-1] == "Settings":
            page.keyboard.press("Enter")
            assert page.is_visible("#settings")
            page.keyboard.press("Escape")
            assert not page.is_visible("#settings")
    places = [told.index(name) for name in order]
    assert places == sorted(places) and "NAMELESS" not in told


def test_models_answer_side_by_side_and_below_each_other_where_it_is_narrow(open_page, arena):
    page = open_page(arena)
    ask(page, "who?", with_picture=True)
    told = wait_for_answers(page, 2)
    assert told == ["I am alpha, turn 1: who? seen ", "I am beta, turn 1: who? seen "]
    assert page.locator(".answer h3").all_inner_texts() == ["alpha", "beta"]
    first, second = (page.locator(".answer").nth(index).bounding_box() for index in (0, 1))
    assert first["y"] == second["y"] and first["x"] + first["width"] <= second["x"]
    page.set_viewport_size({"width": 400, "height": 800})
    first, second = (page.locator(".answer").nth(index).bounding_box() for index in (0, 1))
    assert first["x"] == second["x"] and first["y"] + first["height"] <= second["y"]
    assert not scrolls_sideways(page)
    page.uncheck("#models input >> nth=0")
    ask(page, "and now?")  # beta goes on from its own answer
    assert wait_for_answers(page) == ["I am beta, turn 2: and now? seen "]


def test_a_blind_vote_is_written_and_shows_the_names(open_page, arena, votes):
    page, content = open_page(arena), picture_bytes()
    page.check("#blind input")
    ask(page, "which?", with_picture=True)
    told = wait_for_answers(page, 2)
    names = [words.split()[2].rstrip(",") for words in told]
    assert sorted(names) == ["alpha", "beta"]
    assert page.locator(".answer h3").all_inner_texts() == ["Answer A", "Answer B"]
    assert not page.is_visible(".metrics") and not page.is_visible("text=Heat map")
    page.click("text=B is better")
    playwright.expect(page.locator(".vote")).to_contain_text(f"Your vote: B is better ({names[1]})")
    assert page.locator(".answer h3").all_inner_texts() == names
    vote = json.loads(votes.read_text().splitlines()[-1])
    assert vote.pop("time").endswith("+00:00")
    assert vote == {
        "models": names,
        "blind": True,
        "question": "which?",
        "image_sha256": [hashlib.sha256(content).hexdigest()],
        "answers": told,
        "choice": 1,
    }


def test_no_vote_where_an_answer_is_missing(open_page, arena):
    page = open_page(arena)
    page.check("#blind input")
    ask(page, "full")
    wait_for_answers(page, 2)
    playwright.expect(page.locator(".vote")).to_contain_text("there is no vote")
    notes = page.locator(".answer > .note").all_inner_texts()
    assert notes == ["The server has too much to do. Try again in 2 s."] * 2
    assert sorted(page.locator(".answer h3").all_inner_texts()) == ["alpha", "beta"]


def test_a_blank_picture_in_one_click(open_page, arena, models):
    page = open_page(arena)
    ask(page, "what?", with_picture=True)
    wait_for_answers(page, 2)
    page.click(".answer >> nth=1 >> text=Blank picture")
    playwright.expect(page.locator(".blank .words")).to_have_text("I am beta, turn 1: what? blank ")
    playwright.expect(page.locator(".blank .note")).to_contain_text("makes a difference")
    blank = images_of(engine_of(models, 1).requests[-1])[0]
    assert blank.size == (80, 40)
    assert blank.getcolors() == [(80 * 40, (127, 127, 127))]  # as `blank_image` makes it


def test_a_heat_map_lies_over_what_the_model_saw(open_page, arena):
    page = open_page(arena)
    ask(page, "where?", with_picture=True)
    wait_for_answers(page, 2)
    page.click(".answer >> nth=0 >> text=Heat map")
    page.wait_for_selector(".heat canvas")
    frame, picture, patches = (
        page.locator(name).bounding_box() for name in (".heat", ".heat img", ".heat canvas")
    )
    assert frame["width"] / frame["height"] == pytest.approx(2, rel=0.03)
    # 80 x 40 is padded to a square: the patches reach a half of its height above and below
    assert patches["width"] == pytest.approx(picture["width"], abs=1)
    assert patches["height"] == pytest.approx(2 * picture["height"], abs=2)
    assert patches["y"] == pytest.approx(picture["y"] - picture["height"] / 2, abs=2)
    assert "<i>cat</i>.png" in page.get_attribute(".heat", "aria-label")


def test_a_heat_map_of_the_picture_that_is_chosen(open_page, chat):
    page = open_page(chat)
    ask(page, "first", with_picture=True)
    wait_for_answers(page)
    add_picture(page, picture_bytes(40, 80))
    ask(page, "second")
    wait_for_answers(page)
    page.click(".answer >> nth=1 >> text=Heat map")
    page.wait_for_selector(".heat canvas")
    shape = "([e]) => e.naturalWidth < e.naturalHeight"
    assert page.locator(".heat img").evaluate_all(shape)  # of the latest
    pressed = page.locator(".map .thumbnail")
    assert [one.get_attribute("aria-pressed") for one in pressed.all()] == ["false", "true"]
    pressed.first.click()
    playwright.expect(pressed.first).to_have_attribute("aria-pressed", "true")
    page.wait_for_selector(".heat canvas")
    assert not page.locator(".heat img").evaluate_all(shape)
    assert page.evaluate("document.activeElement.ariaLabel").startswith("Picture 1")


def test_html_stays_text(open_page, chat):
    page = open_page(chat)
    ask(page, "html", with_picture=True)
    assert wait_for_answers(page) == ["<b id=bold>bold</b><img src=x onerror=alert(1)> & more "]
    ask(page, "<script>alert(1)</script><b id=bold>x</b>")
    wait_for_answers(page)
    assert page.locator("#bold, main i, main script").count() == 0


def test_colours_follow_the_system_and_the_switch(open_page, chat):
    def paper(page) -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return int(re.findall(r"\d+", colour)[0])

    page = open_page(chat, color_scheme="dark")
    assert paper(page) < 50
    page.click("#theme")  # light
    assert paper(page) > 200
    page.reload()
    page.wait_for_selector(".intro table")
    assert paper(page) > 200
    assert page.get_attribute("#theme", "aria-label") == "Colours: light"


def test_chinese_on_a_narrow_screen(open_page, arena):
    page = open_page(arena, width=400, locale="zh-CN")
    assert "连接器" in page.inner_text("h2") and not scrolls_sideways(page)
    ask(page, "什么？" * 40 + "x" * 200, with_picture=True)
    wait_for_answers(page, 2)
    page.click(".answer >> nth=0 >> text=热力图")
    page.wait_for_selector(".heat canvas")
    assert not scrolls_sideways(page)
    page.click("#language")
    assert page.inner_text("#composer button[type=submit]") == "Ask"
    page.reload()
    page.wait_for_selector(".turn")
    assert page.inner_text("#new") == "New"


def test_a_key_is_asked_for_and_not_stored(open_page, models):
    with serve_page(models, api_key="right") as address:
        page = open_page(address)
        page.fill("#key input", "wrong")
        page.click("#key .primary")
        playwright.expect(page.locator("#key h2")).to_contain_text("did not accept")
        page.fill("#key input", "right")
        page.press("#key input", "Enter")
        page.wait_for_selector(".intro table")
        ask(page, "open?")
        assert len(wait_for_answers(page, 2)) == 2
        assert "right" not in page.evaluate("JSON.stringify([localStorage, sessionStorage])")


def test_a_server_that_is_away_is_told_in_words(open_page, chat):
    page = open_page(chat)
    page.context.set_offline(True)
    ask(page, "there?")
    playwright.expect(page.locator(".answer > .note")).to_contain_text("server is away")
    page.context.set_offline(False)
    page.click("text=Retry")
    assert wait_for_answers(page) == ["I am alpha, turn 1: there?  "]
