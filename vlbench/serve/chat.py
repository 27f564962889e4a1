"""`python -m vlbench chat`: ask a trained model one question about a picture."""

from __future__ import annotations

from typing import Any

from vlbench.words import given_keys


def main(words: list[str]) -> int:
    """Answer `run=DIR question=TEXT [image=FILE]` on standard output; return the exit code."""
    given = given_keys("chat", words, ("run", "question"), ("image",))
    from vlbench import load  # after the check: it takes seconds

    vlm = load(given["run"])
    content: list[dict[str, Any]] = [{"type": "text", "text": given["question"]}]
    if "image" in given:
        content.insert(0, {"type": "image", "image": given["image"]})
    print(vlm.chat([{"role": "user", "content": content}], max_new_tokens=256))
    return 0
