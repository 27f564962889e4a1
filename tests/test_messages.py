"""Messages of Python programs: a mistake in them is one line, whatever its type."""

from __future__ import annotations

from typing import Any

import pytest

from vlbench.errors import UserError
from vlbench.processor import sample_from_messages

TEXT = {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": ["user"], "content": "What?"}, "message 0: role is ['user']; allowed are"),
        ({"role": {"a": 1}, "content": "What?"}, "message 0: role is {'a': 1}; allowed are"),
        ({"role": None, "content": "What?"}, "message 0: role is None; allowed are"),
        ({"role": "user", "content": [{**TEXT, "type": ["text"]}]}, "message 0: a part is {'type'"),
        ({"role": "user", "content": [{**TEXT, "type": {}}]}, "message 0: a part is {'type'"),
        ({"role": "user", "content": [["text"]]}, "message 0: a part is ['text']"),
        ({"role": "user", "content": 3}, "message 0 is {'role'"),
        ("What?", "message 0 is 'What?'"),
    ],
)
def test_a_mistake_in_messages_is_one_line(message: Any, said: str) -> None:
    with pytest.raises(UserError) as mistake:
        sample_from_messages([message])
    assert said in str(mistake.value) and "\n" not in str(mistake.value)
