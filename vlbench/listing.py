"""What there is, as lines of text: recipes, sizes, connectors, towers, and the keys of a recipe."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator

from vlbench.config import encoder_names, recipe, schema
from vlbench.connector import registry
from vlbench.connector.option_schema import ConnectorOption
from vlbench.errors import UserError, suggest_name
from vlbench.strict_values import kind_label, yaml_text
from vlbench.text_tables import format_table


def listing_lines(arguments: list[str]) -> list[str]:
    """Return everything, or only the kinds named in `words` (there towers are listed in full).

    `connectors size=SIZE` gives what each connector costs at that size.
    """
    if arguments[:1] == ["connectors"] and len(arguments) == 2 and arguments[1].startswith("size="):
        return connector_cost_lines(arguments[1].removeprefix("size="))
    for word in arguments:
        if word not in LISTED_KINDS:
            kinds = ", ".join(LISTED_KINDS)
            raise UserError(
                f"nothing called '{word}' to list; kinds: "
                f"{kinds}.{suggest_name(word, LISTED_KINDS)}"
            )
    if "towers" in arguments and len(arguments) == 1:
        return list(encoder_names.vision_encoder_names())
    result: list[str] = []
    for kind in arguments or LISTED_KINDS:
        result += [kind, *(f"  {line}" for line in LISTED_KINDS[kind]()), ""]
    return result[:-1]


def recipe_key_lines() -> list[str]:
    """Return the table of all keys of a recipe: name, type, default, meaning."""
    return format_table([("key", "type", "default", "meaning"), *schema.key_rows()])


def connector_cost_lines(size: str) -> list[str]:
    """Return a table of what each connector costs at `size`, counted without taking memory."""
    recipes = {name: [f"size={size}", f"connector.name={name}"] for name in _usable_connectors()}
    known = {
        name: recipe.load_recipe(["recipe=yivl_llava", *words]) for name, words in recipes.items()
    }  # first, as a mistake in the size needs no torch
    from vlbench.model.connector_cost import QUESTION_TOKENS, count_recipe_cost

    rows = [("connector", "parameters", "tokens", "latents", "prefill TFLOPs")]
    for name, one in known.items():
        count = count_recipe_cost(one)
        flops = f"{count.flops / 1e12:.3g}"
        numbers = (f"{count.parameters:,}", str(count.tokens), str(count.latents), flops)
        rows.append((name, *numbers))
    side = list(next(iter(known.values())).stages.values())[-1].image_size
    return [
        *format_table(rows, "<>"),
        "",
        f"A picture at {side} pixels takes so many tokens of the text; latents are attended to",
        "inside the language model. Prefill: connector and language model, a picture and "
        f"{QUESTION_TOKENS}",
        "tokens of text.",
    ]


def _recipe_lines() -> list[str]:
    return [
        f"{name:14} {recipe.file_summary(path)}" for name, path in recipe.recipe_files().items()
    ]


def _size_lines() -> list[str]:
    return [f"{name:14} {recipe.file_summary(path)}" for name, path in recipe.size_files().items()]


def _connector_lines() -> list[str]:
    result = []
    for name in registry.connector_locations():
        try:
            known = registry.connector_options(name)
            text = (
                ", ".join(_option_text(key, option) for key, option in known.items())
                or "no options"
            )
        except UserError as mistake:  # one broken file must not hide the others
            text = f"cannot be used: {mistake}"
        result.append(f"{name:14} {text}")
    return result


def _usable_connectors() -> Iterator[str]:
    """Give the names of connectors; one broken file must not hide the others."""
    for name in registry.connector_locations():
        try:
            registry.connector_options(name)
        except UserError as mistake:
            print(f"{name} cannot be used: {mistake}", file=sys.stderr)
        else:
            yield name


def _option_text(name: str, option: ConnectorOption) -> str:
    text = f"{name}: {kind_label(option.kind)}"
    if option.default is inspect.Parameter.empty:
        return f"{text} (needed)"
    return f"{text} = {yaml_text(option.default)}"


def _encoder_lines() -> list[str]:
    some = [f"{name:14} {text}" for name, text in encoder_names.EMBEDDED_ENCODERS.items()]
    some += encoder_names.CURATED_ENCODERS
    return [
        *some,
        f"... {len(encoder_names.vision_encoder_names())} in all: python -m vlbench list towers",
    ]


LISTED_KINDS: dict[str, Callable[[], list[str]]] = {
    "recipes": _recipe_lines,
    "sizes": _size_lines,
    "connectors": _connector_lines,
    "towers": _encoder_lines,
}
