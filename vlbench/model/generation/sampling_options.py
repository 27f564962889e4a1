"""The options of `generate` and `chat`, and what replaces those of transformers. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from vlbench.errors import UserError, suggest_name

CHAT_OPTIONS = ("max_new_tokens", "temperature", "top_p", "seed", "stream", "past", "compiled")
GENERATE_OPTIONS = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "seed",
    "on_token",
    "past",
    "compiled",
)
MIN_TEMPERATURE = 1e-4  # below, logits divided by the temperature are no longer finite
_GREEDY_HINT = "Answers are greedy at temperature=0, the default, and sampled at any other"
_NARROWING_HINT = "Sampling is narrowed by top_p and temperature alone"
_LENGTH_HINT = "Say max_new_tokens, the number of new tokens"
_PENALTY_HINT = "There is no penalty of that kind"
_BEAM_SEARCH_HINT = (
    "There is no search over beams; an answer is greedy, or sampled with temperature and top_p"
)
TRANSFORMERS_HINTS = {
    "do_sample": _GREEDY_HINT,
    "num_beams": _BEAM_SEARCH_HINT,
    "num_beam_groups": _BEAM_SEARCH_HINT,
    "length_penalty": _BEAM_SEARCH_HINT,
    "early_stopping": _BEAM_SEARCH_HINT,
    "num_return_sequences": "One answer is written; ask again with another seed",
    **dict.fromkeys(("top_k", "min_p", "typical_p", "epsilon_cutoff", "top_h"), _NARROWING_HINT),
    **dict.fromkeys(("max_length", "max_tokens", "min_new_tokens", "min_length"), _LENGTH_HINT),
    **dict.fromkeys(
        ("repetition_penalty", "no_repeat_ngram_size", "presence_penalty"), _PENALTY_HINT
    ),
    "frequency_penalty": _PENALTY_HINT,
    "stop": "An answer ends where the template says; cut its text afterwards",
    "stop_strings": "An answer ends where the template says; cut its text afterwards",
    "streamer": "With stream=True chat prints the answer while it is written",
}
"""What vlbench has instead of the options of transformers' `generate` that it does not have."""


def refuse_unknown_options(caller: str, names: Iterable[str], known_options: Iterable[str]) -> None:
    """Raise a UserError for the first of `names`: `caller` has no such option.

    An option of transformers is answered with what replaces it here.
    """
    known_options = tuple(known_options)
    for name in names:
        hint = (
            f" {TRANSFORMERS_HINTS[name]}."
            if name in TRANSFORMERS_HINTS
            else suggest_name(name, known_options)
        )
        raise UserError(
            f"{caller} has no option '{name}'; it takes {', '.join(known_options)}.{hint}"
        )


def check_sampling_options(max_new_tokens: Any, temperature: Any, top_p: Any, seed: Any) -> None:
    """Raise a UserError for the first option whose value is not allowed."""
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens!r}; allowed are whole numbers from 1")
    if not _is_number(temperature) or not (
        temperature == 0 or MIN_TEMPERATURE <= temperature < math.inf
    ):
        allowed = f"0 (greedy) and numbers from {MIN_TEMPERATURE}"
        raise UserError(f"temperature is {temperature!r}; allowed are {allowed}")
    if not _is_number(top_p) or not 0 <= top_p <= 1:
        raise UserError(f"top_p is {top_p!r}; allowed are numbers from 0 to 1")
    if type(seed) is not int or not 0 <= seed < 2**64:
        raise UserError(f"seed is {seed!r}; allowed are whole numbers from 0 to {2**64 - 1}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
