"""What a person does on the page of `serve`, for tests in a browser; `page` is playwright's."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

PNG = {"name": "<i>cat</i>.png", "mimeType": "image/png"}
WAIT = 10_000  # milliseconds


def picture_bytes(width: int = 80, height: int = 40, kind: str = "PNG", **options: Any) -> bytes:
    """Return a picture of two colours."""
    image = Image.new("RGB", (width, height), (200, 60, 20))
    image.paste((20, 60, 200), (0, 0, width // 2, height // 2))
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def add_picture(page, content: bytes = b"") -> None:
    page.set_input_files(
        "#composer input[type=file]", {**PNG, "buffer": content or picture_bytes()}
    )
    page.wait_for_selector("#composer .thumbnail")


def ask(page, question: str, with_picture: bool = False) -> None:
    if with_picture:
        add_picture(page)
    page.fill("#question", question)
    page.press("#question", "Enter")


def wait_for_answers(page, count: int = 1) -> list[str]:
    """Return the words of the last turn's answers once all have ended."""
    from playwright.sync_api import expect  # here, as it may not be installed

    last = page.locator(".turn").last
    expect(last.locator(".answer")).to_have_count(count)
    expect(last.locator(".answer.coming")).to_have_count(0, timeout=WAIT)
    return last.locator(".answer > .words").all_inner_texts()


def transfer_with(page, name: str, content: bytes):
    """Return a DataTransfer with a file, as dropping and pasting bring one."""
    return page.evaluate_handle(
        """([name, text]) => {
            const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, {type: "image/png"}));
            return transfer;
        }""",
        [name, base64.b64encode(content).decode()],
    )


def tab(page) -> str:
    """Press Tab, and return the name of what has the focus then."""
    page.keyboard.press("Tab")
    return page.evaluate(
        """() => {const e = document.activeElement;
        return e.ariaLabel || e.labels?.[0]?.innerText || e.innerText || "NAMELESS"}"""
    )


def scrolls_sideways(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth > innerWidth")
