"""What recipes can name, as lines of text: recipes, sizes, connectors, vision encoders, data."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from vlbench import encoder_names
from vlbench.command_line.arguments import ListArguments, ListedKind
from vlbench.config import recipe
from vlbench.config.data_schema import mixture_files
from vlbench.config.recipe_files import recipe_files, size_files
from vlbench.connector import registry
from vlbench.connector.option_schema import ConnectorOption
from vlbench.data.annotation_mapping import AnnotationMapping, read_mapping
from vlbench.data.mapped_sources import mapping_files
from vlbench.errors import UserError, one_line
from vlbench.garbage_collection import pause_garbage_collection
from vlbench.strict_values import kind_label, yaml_text
from vlbench.text_files import read_text, split_lines
from vlbench.text_tables import format_table


def listing_lines(arguments: ListArguments) -> list[str]:
    """Return the lines of all kinds, or of those that are asked for.

    With a `size`: what each connector costs at that size; `encoders` alone are listed in full.
    """
    if arguments.size is not None:
        if arguments.kinds != ("connectors",):
            raise UserError("size= is for `list connectors size=NAME`")
        return connector_cost_lines(arguments.size)
    if arguments.kinds == ("encoders",):
        return list(encoder_names.vision_encoder_names())
    lines: list[str] = []
    for kind in arguments.kinds or LISTED_KINDS:
        lines += [kind, *(f"  {line}" for line in LISTED_KINDS[kind]()), ""]
    return lines[:-1]


def connector_cost_lines(size: str) -> list[str]:
    """Return a table of what each connector costs at `size`, counted without taking memory.

    Below it stands why a connector does not fit, where one does not.
    """
    recipes = {name: [f"size={size}", f"connector.name={name}"] for name in _usable_connectors()}
    # first, as a mistake in the size needs no torch
    known = {
        name: recipe.load_recipe(["recipe=yivl_llava", *words]) for name, words in recipes.items()
    }
    with pause_garbage_collection():
        from vlbench.connector.blank_inputs import QUESTION_TOKENS
        from vlbench.train.shape_checks import cost_counter

    first = next(iter(known.values()))  # all have the same encoder and language model
    side = list(first.stages.values())[-1].image_size
    counter = cost_counter(first.model, [side])
    rows = [("connector", "parameters", "tokens", "latents", "prefill TFLOPs")]
    unfit: list[str] = []
    for name, one in known.items():
        try:
            connector_class = registry.load_connector(name)
            connector = counter.build_connector(connector_class, one.model.connector_options)
            costs = (
                f"{counter.count_parameters(connector):,}",
                str(connector.tokens_per_image),
                str(counter.count_latents(connector)),
                f"{counter.count_flops(connector) / 1e12:.3g}",
            )
        except ValueError as error:  # of its options, for an encoder or language model of this size
            rows.append((name, "-", "-", "-", "-"))
            unfit.append(one_line(f"{name} does not fit: {error}"))
            continue
        rows.append((name, *costs))
    return [
        *format_table(rows, "<>"),
        *unfit,
        "",
        f"An image at {side} pixels takes so many tokens of the text; latents are attended to",
        "inside the language model. Prefill: connector and language model, an image and "
        f"{QUESTION_TOKENS}",
        "tokens of text.",
    ]


def file_summary(path: Path) -> str:
    """Return the summary of a recipe or size: its first comment that is not a command."""
    for line in split_lines(read_text(path)):
        text = line.removeprefix("#").strip()
        if line.startswith("#") and text and not text.startswith("python -m"):
            return text
    return ""


def _recipe_lines() -> list[str]:
    return [f"{name:14} {file_summary(path)}" for name, path in recipe_files().items()]


def _size_lines() -> list[str]:
    return [f"{name:14} {file_summary(path)}" for name, path in size_files().items()]


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
        f"... {len(encoder_names.vision_encoder_names())} in all: python -m vlbench list encoders",
    ]


def _data_lines() -> list[str]:
    """Return what each mapping of annotation files is of, and what it needs in its folder."""
    lines = []
    for name, file in mapping_files().items():
        indent = " " * 17
        try:
            summary, mapping = file_summary(file), read_mapping(file)
        except UserError as mistake:  # one broken file must not hide the others
            lines.append(f"{name:16} cannot be used: {mistake.lines[0]}")
            continue
        lines.append(f"{name:16} {summary}")
        files, splits = mapping_needs(mapping)
        told = f"; splits {', '.join(splits)}" if splits else ""
        lines.append(f"{indent}needs {', '.join(files)}{told}")
        lines += [f"{indent}from {mapping.get}"] if mapping.get else []
    return [
        *lines,
        "data.train=NAME:FOLDER or NAME:FOLDER:SPLIT reads one; a file NAME.yaml is one",
        "",
        *(f"{name:16} {file_summary(file)}" for name, file in mixture_files().items()),
        "data.mix=NAME reads one of these mixtures; a file NAME.yaml is one",
    ]


def mapping_needs(mapping: AnnotationMapping) -> tuple[list[str], list[str]]:
    """Return the files that the first split of a mapping needs, pictures last, and its splits."""
    first_split = next(iter((mapping.splits or {}).values()), ("",))[0]
    joined = [one.file for one in (mapping.join or {}).values()]
    files = dict.fromkeys(filter(None, (mapping.records, *joined, mapping.image)))
    return [text.replace("{split}", first_split) for text in files], list(mapping.splits or {})


LISTED_KINDS: dict[ListedKind, Callable[[], list[str]]] = {
    "recipes": _recipe_lines,
    "sizes": _size_lines,
    "connectors": _connector_lines,
    "encoders": _encoder_lines,
    "data": _data_lines,
}
