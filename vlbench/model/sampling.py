"""The options of `generate` and `chat`, and what stands for those of transformers. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from vlbench.mistakes import Mistake, nearest

CHAT = ("max_new_tokens", "temperature", "top_p", "seed", "stream", "past")
OPTIONS = ("max_new_tokens", "temperature", "top_p", "seed", "on_token", "past", "compiled")
_GREEDY = "Answers are greedy at temperature=0, the default, and sampled at any other"
_CUT = "Sampling is narrowed by top_p and temperature alone"
_LENGTH = "Say max_new_tokens, the number of new tokens"
_PENALTY = "There is no penalty of that kind"
_BEAMS = "There is no search over beams; an answer is greedy, or sampled with temperature and top_p"
ELSEWHERE = {
    "do_sample": _GREEDY,
    "num_beams": _BEAMS,
    "num_beam_groups": _BEAMS,
    "length_penalty": _BEAMS,
    "early_stopping": _BEAMS,
    "num_return_sequences": "One answer is written; ask again with another seed",
    **dict.fromkeys(("top_k", "min_p", "typical_p", "epsilon_cutoff", "top_h"), _CUT),
    **dict.fromkeys(("max_length", "max_tokens", "min_new_tokens", "min_length"), _LENGTH),
    **dict.fromkeys(("repetition_penalty", "no_repeat_ngram_size", "presence_penalty"), _PENALTY),
    "frequency_penalty": _PENALTY,
    "stop": "An answer ends where the template says; cut its text afterwards",
    "stop_strings": "An answer ends where the template says; cut its text afterwards",
    "streamer": "With stream=True chat prints the answer while it is written",
}
"""What vlbench has instead of the options of transformers' `generate` that it does not have."""


def refuse_unknown(what: str, names: Iterable[str], takes: Iterable[str]) -> None:
    """Raise a Mistake for the first of `names`: `what` has no such option, but those it `takes`.

    An option of transformers is answered with what stands for it here.
    """
    takes = tuple(takes)
    for name in names:
        hint = f" {ELSEWHERE[name]}." if name in ELSEWHERE else nearest(name, takes)
        raise Mistake(f"{what} has no option '{name}'; it takes {', '.join(takes)}.{hint}")
