"""Records for learning from preferences, read as conversations to learn. Imports no torch.

KTO's have a verdict on their answer, DPO's two answers to the last question. Learned as they are, a
bad answer would be learned too, and a good one left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlbench.data.record_keys import EMPTY_VALUES
from vlbench.data.sample import ChatTurn
from vlbench.errors import BadSample

VERDICT_KEYS = {"label": "completion", "kto_tag": None}
"""Keys of TRL's and LLaMA-Factory's data, false where an answer is undesirable -> the key beside
them by which they are known: a `label` alone may be anything."""
CHOSEN_KEY = "chosen"


def refuse_preferences(name: str, turns: Sequence[ChatTurn], record: Mapping[str, Any]) -> None:
    """Raise BadSample for an answer that is not to be learned, or the better one of two in a key.

    Whole conversations that have a rejected answer beside them are conversations.
    """
    for key, beside in VERDICT_KEYS.items():
        if record.get(key) is False and beside in (None, *record):
            raise BadSample(
                name, f"{key!r} is false: its answer is not to be learned; leave the record out"
            )
    if turns[-1].role == "human" and record.get(CHOSEN_KEY) not in EMPTY_VALUES:
        raise BadSample(
            name, f"{CHOSEN_KEY!r} is not read: write the answer as the last turn, or leave it out"
        )
