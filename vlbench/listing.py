"""What there is, as lines of text: recipes, sizes, connectors, towers, and the keys of a recipe."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator

from vlbench import plugins, recipe, schema, towers
from vlbench.mistakes import Mistake, nearest
from vlbench.signature import Option
from vlbench.values import label


def lines(words: list[str]) -> list[str]:
    """Return everything, or only the kinds named in `words` (there towers are listed in full).

    `connectors size=SIZE` gives what each connector costs at that size.
    """
    if words[:1] == ["connectors"] and len(words) == 2 and words[1].startswith("size="):
        return costs(words[1].removeprefix("size="))
    for word in words:
        if word not in KINDS:
            kinds = ", ".join(KINDS)
            raise Mistake(f"nothing called '{word}' to list; kinds: {kinds}.{nearest(word, KINDS)}")
    if "towers" in words and len(words) == 1:
        return list(towers.names())
    result: list[str] = []
    for kind in words or KINDS:
        result += [kind, *(f"  {line}" for line in KINDS[kind]()), ""]
    return result[:-1]


def keys() -> list[str]:
    """Return the table of all keys of a recipe: name, type, default, meaning."""
    table = [schema.Row("key", "type", "default", "meaning"), *schema.rows()]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    return [
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row.help]
        )
        for row in table
    ]


def costs(size: str) -> list[str]:
    """Return a table of what each connector costs at `size`, counted without taking memory."""
    recipes = {name: [f"size={size}", f"connector.name={name}"] for name in _usable()}
    known = {
        name: recipe.load(["recipe=yivl_llava", *words]) for name, words in recipes.items()
    }  # first, as a mistake in the size needs no torch
    from vlbench.model.cost import TEXT, cost

    rows = [("connector", "parameters", "tokens", "latents", "prefill TFLOPs")]
    for name, one in known.items():
        count = cost(one)
        flops = f"{count.flops / 1e12:.3g}"
        numbers = (f"{count.parameters:,}", str(count.tokens), str(count.latents), flops)
        rows.append((name, *numbers))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    table = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    side = list(next(iter(known.values())).stages.values())[-1].image_size
    return [
        *table,
        "",
        f"A picture at {side} pixels takes so many tokens of the text; latents are attended to",
        f"inside the language model. Prefill: connector and language model, a picture and {TEXT}",
        "tokens of text.",
    ]


def _recipes() -> list[str]:
    return [f"{name:14} {recipe.summary(path)}" for name, path in recipe.recipes().items()]


def _sizes() -> list[str]:
    return [f"{name:14} {recipe.summary(path)}" for name, path in recipe.sizes().items()]


def _connectors() -> list[str]:
    result = []
    for name in plugins.sources():
        try:
            known = plugins.options(name)
            text = ", ".join(_option(key, option) for key, option in known.items()) or "no options"
        except Mistake as mistake:  # one broken file must not hide the others
            text = f"cannot be used: {mistake}"
        result.append(f"{name:14} {text}")
    return result


def _usable() -> Iterator[str]:
    """Give the names of connectors; one broken file must not hide the others."""
    for name in plugins.sources():
        try:
            plugins.options(name)
        except Mistake as mistake:
            print(f"{name} cannot be used: {mistake}", file=sys.stderr)
        else:
            yield name


def _option(name: str, option: Option) -> str:
    text = f"{name}: {label(option.kind)}"
    if option.default is inspect.Parameter.empty:
        return f"{text} (needed)"
    shown = option.default
    if shown is None or isinstance(shown, bool):
        shown = {None: "null", True: "true", False: "false"}[shown]
    return f"{text} = {shown}"


def _towers() -> list[str]:
    some = [f"{name:14} {text}" for name, text in towers.EMBEDDED.items()]
    some += towers.CURATED
    return [*some, f"... {len(towers.names())} in all: python -m vlbench list towers"]


KINDS: dict[str, Callable[[], list[str]]] = {
    "recipes": _recipes,
    "sizes": _sizes,
    "connectors": _connectors,
    "towers": _towers,
}
