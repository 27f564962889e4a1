"""The options of `generate` and `chat`, and what stands for those of transformers. No torch."""

from __future__ import annotations

from collections.abc import Iterable

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
    """Raise a Mistake for the first of `names`: `what` has no such option, but those it `takes`.

    An option of transformers is answered with what stands for it here.
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
