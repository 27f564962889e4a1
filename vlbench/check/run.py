"""`python -m vlbench check recipe=... data.train=FILE`: look at all data, write what is found."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlbench.check.audit import Shown, audit
from vlbench.check.findings import (
    MEANING,
    REFUSED,
    Finding,
    Lengths,
    encoded,
    left_unread,
    look,
    notes,
    odd_texts,
    of_pictures,
    repeated,
    samples_of,
)
from vlbench.data.llava import LlavaJson
from vlbench.data.sample import Sample, Source
from vlbench.data.shards import Shards
from vlbench.data.steps import Memo
from vlbench.data.template import TEMPLATES, Template
from vlbench.data.tokenizer import Tokenizer
from vlbench.evaluate.results import spread
from vlbench.files import json_lines, write_whole
from vlbench.mistakes import BadSample, Mistake, one_line
from vlbench.model.language import tokenizer_folder
from vlbench.schema import Recipe
from vlbench.train.legs import Leg, check_captions, judge_source, plan
from vlbench.train.sizes import tokens_of_stages

FILES = (LlavaJson, Shards)  # sources whose samples somebody has written
NAMED = 5  # findings of a kind that are printed; all are in findings.jsonl
SHOWN = 6  # samples of a source that the page shows of each stage


def main(recipe: Recipe, folder: Path) -> int:
    """Check the data of a recipe's stages, print a summary, write findings.jsonl and audit.html.

    Returns 0, or 2 if training would not start with these data.
    """
    legs = plan(recipe)
    places = tokens_of_stages(recipe, legs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Mistake(f"out={folder} cannot be written ({error.strerror})") from error
    tokenizer = Tokenizer.load(tokenizer_folder(recipe.language.weights))
    template = TEMPLATES[recipe.language.template].bound(tokenizer.eos_text)
    looked = [_looked_at(source, recipe, template) for source in _different(legs)]
    findings = [finding for one in looked for finding in one.findings]
    lines = [line for one in looked for line in _source_lines(one)]
    shown: list[Shown] = []
    reading = {
        "template": template,
        "tokenizer": Memo(tokenizer),
        "decode": tokenizer.decode,
        "max_length": recipe.language.max_length,
    }
    for leg, tokens in zip(legs, places, strict=True):
        told, found, some = _stage(leg, {**reading, "tokens_per_image": tokens}, looked)
        lines += told
        findings += found
        shown += some
    findings = list(dict.fromkeys(findings))
    lines += ["", *_summary(findings)]
    write_whole(folder / "findings.jsonl", json_lines(map(asdict, findings)))
    write_whole(folder / "audit.html", audit(shown, recipe))
    write_whole(folder / "report.txt", "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"\nwrote {folder}: report.txt, findings.jsonl, audit.html (what the model reads)")
    return _verdict(recipe, legs, findings)


@dataclass
class Looked:
    """A source that was looked at."""

    source: Source
    good: dict[int, Sample]
    """Samples that are well formed and whose pictures can be read, by index."""
    findings: list[Finding]
    pictures: int


def _different(legs: list[Leg]) -> Iterator[Source]:
    """Give each source of the stages once."""
    known = set()
    for leg in legs:
        for source in leg.sources:
            if _identity(source) not in known:
                known.add(_identity(source))
                yield source


def _identity(source: Source) -> tuple[str, str, str, int]:
    """Return what two stages have in common if they learn from the same source."""
    images = str(getattr(source, "images", ""))
    return type(source).__name__, source.name, images, len(source)


def _looked_at(source: Source, recipe: Recipe, template: Template) -> Looked:
    """Look at records and pictures; rendered scenes have no files and are taken as they are."""
    if not isinstance(source, FILES):
        return Looked(source, {n: source[n] for n in range(min(len(source), 1000))}, [], 0)
    good, findings = samples_of(source)
    workers = recipe.data.workers or os.cpu_count() or 1
    seen = look((p for sample in good.values() for p in sample.pictures), workers)
    findings += repeated(source.name, good)
    findings += of_pictures(source.name, good, seen)
    findings += odd_texts(source.name, good, template)
    findings += left_unread(source.name, good)
    fine = {
        index: sample
        for index, sample in good.items()
        if not any(seen[picture].problem for picture in sample.pictures)
    }
    return Looked(source, fine, findings, len(seen))


def _source_lines(one: Looked) -> Iterator[str]:
    if isinstance(one.source, FILES):
        yield f"{one.source.name}: {len(one.source)} records, {one.pictures} pictures"
        yield from (f"  {note}" for note in getattr(one.source, "notes", ()))
        yield from (f"  {note}" for note in notes(one.good))
    else:
        yield f"{one.source.name}: rendered; {len(one.good)} of {len(one.source)} samples looked at"


def _stage(
    leg: Leg, reading: dict[str, Any], looked: list[Looked]
) -> tuple[list[str], list[Finding], list[Shown]]:
    """Encode all samples as a stage would: lines of the report, findings, samples for the audit."""
    tokens = reading["tokens_per_image"]
    lines = [f"\nstage {leg.name}: {tokens} tokens per image, {leg.stage.form}"]
    findings: list[Finding] = []
    shown: list[Shown] = []
    own = {_identity(source) for source in leg.sources}
    for one in looked:
        if _identity(one.source) not in own:
            continue
        samples = list(one.good.values())
        name = one.source.name
        lengths, found = encoded(name, leg.name, samples, reading, leg.stage.form)
        findings += found
        lines += _length_lines(name, lengths, reading["max_length"])
        chosen = spread(samples, min(SHOWN, len(samples)))
        shown += [Shown(leg.name, leg.stage.form, sample, reading) for sample in chosen]
    return lines, findings, shown


def _length_lines(name: str, lengths: Lengths, limit: int) -> Iterator[str]:
    """Say how long the samples of a source are, with a histogram by powers of two."""
    tokens = sorted(lengths.tokens)
    if not tokens:
        yield f"  {name}: nothing can be learned in this stage"
        return
    total, count = sum(tokens), len(tokens)
    yield (
        f"  {name}: {count} samples, {lengths.images} images, {total:,} tokens, "
        f"{lengths.supervised / total:.0%} of them supervised"
    )
    if lengths.skipped:
        yield f"    {lengths.skipped} samples without an image are skipped in a stage of captions"
    yield (
        f"    tokens of a sample: median {tokens[count // 2]}, 99 % up to "
        f"{tokens[min(count - 1, count * 99 // 100)]}, longest {tokens[-1]} (limit {limit})"
    )
    bins = Counter((length - 1).bit_length() for length in tokens)
    most = max(bins.values())
    for power in range(min(bins), max(bins) + 1):
        bar = "#" * -(-40 * bins[power] // most)
        yield f"    {1 << max(0, power - 1):>6} to {1 << power:<6} {bins[power]:>8}  {bar}".rstrip()


def _summary(findings: list[Finding]) -> Iterator[str]:
    """Say how many findings there are of each kind, and name the first."""
    if not findings:
        yield "nothing is wrong"
    for kind, meaning in MEANING.items():
        some = [one for one in findings if one.kind == kind]
        if some:
            yield f"{kind}: {len(some)} ({meaning})"
        for one in some[:NAMED]:
            stage = f" (stage {one.stage})" if one.stage else ""
            label = BadSample(one.sample, "").at(one.source, one.record).label
            yield f"  {label}: {one_line(one.what)}{stage}"
        if len(some) > NAMED:
            yield f"  and {len(some) - NAMED} more in findings.jsonl"


def _verdict(recipe: Recipe, legs: list[Leg], findings: list[Finding]) -> int:
    """Return 2, and say why, if training would not start with these data; else 0."""
    for leg in legs:
        of_leg: list[BadSample] = []
        for source in leg.sources:
            refused = [
                BadSample(one.sample, one.what).at(one.source, one.record)
                for one in findings
                if one.kind == REFUSED and one.source == source.name and one.stage in ("", leg.name)
            ]
            refused = list({one.identity: one for one in refused}.values())
            judge_source(recipe, leg, source, refused, len(refused))
            of_leg += refused
        if leg.steps:
            check_captions(leg, of_leg)
    return 0
