"""The help of the whole program. It needs the table of verbs alone, so that it is there at once."""

from __future__ import annotations

from vlbench.verbs import VERBS

HELP_FLAGS = ("--help", "-h", "help")


def program_help() -> str:
    """Return the help of the whole program."""
    width = max(map(len, VERBS))
    verbs = [f"  {name:{width}} {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: python -m vlbench VERB [KEY=VALUE ...]",
            "",
            "Train vision-language models with any connector, and compare connectors fairly.",
            "",
            *verbs,
            "",
            "Start with: python -m vlbench fit recipe=yivl_llava",
            "`VERB --help` has the table of all keys of a verb, `list` what they can name.",
        ]
    )
