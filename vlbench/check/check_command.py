"""`python -m vlbench check recipe=... data.train=FILE`: look at all data, write what is found."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from vlbench.check.sample_checks import (
    KIND_MEANINGS,
    REFUSED,
    DataFinding,
    StageTokenCounts,
    check_images,
    encode_samples,
    find_duplicates,
    find_image_problems,
    find_odd_texts,
    find_unread_keys,
    read_valid_samples,
    reading_notes,
)
from vlbench.check.supervision_audit import AuditSample, render_audit
from vlbench.config.schema import Recipe
from vlbench.data.chat_template import CHAT_TEMPLATES, ChatTemplate
from vlbench.data.conversation_files import LlavaJson
from vlbench.data.sample import Sample, SampleSource
from vlbench.data.sample_encoding import CachedTokenizer, SampleEncoder
from vlbench.data.shards import WebDatasetShards
from vlbench.data.shuffle import pick_fixed_subset
from vlbench.data.tokenizer import Tokenizer
from vlbench.errors import BadSample, UserError, escape_to_one_line
from vlbench.model.language_model import tokenizer_folder
from vlbench.text_files import format_json_lines, write_atomically
from vlbench.train.shape_checks import tokens_per_image_by_stage
from vlbench.train.stage_plan import (
    StageRun,
    check_caption_images,
    check_source_bad_samples,
    plan_stage_runs,
)

FILE_SOURCES = (LlavaJson, WebDatasetShards)  # sources whose samples somebody has written
MAX_FINDINGS_PRINTED = 5  # findings of a kind that are printed; all are in findings.jsonl
MAX_SAMPLES_SHOWN = 6  # samples of a source that the page shows of each stage


def run_check(recipe: Recipe, folder: Path) -> int:
    """Check the data of a recipe's stages, print a summary, write findings.jsonl and audit.html.

    Returns 0, or 2 if training would not start with these data.
    """
    legs = plan_stage_runs(recipe)
    places = tokens_per_image_by_stage(recipe, legs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={folder} cannot be written ({error.strerror})") from error
    tokenizer = Tokenizer.load(tokenizer_folder(recipe.language.weights))
    template = CHAT_TEMPLATES[recipe.language.template].bind_eos(tokenizer.eos_token)
    looked = [_check_source(source, recipe, template) for source in _unique_sources(legs)]
    findings = [finding for one in looked for finding in one.findings]
    lines = [line for one in looked for line in _source_lines(one)]
    shown: list[AuditSample] = []
    cached_tokenizer = CachedTokenizer(tokenizer)
    for leg, tokens in zip(legs, places, strict=True):
        encoder = SampleEncoder(
            cached_tokenizer,
            template,
            tokens,
            recipe.language.max_length,
            leg.stage.sample_format,
        )
        told, found, some = _check_stage(leg, encoder, looked)
        lines += told
        findings += found
        shown += some
    findings = list(dict.fromkeys(findings))
    lines += ["", *_summary_lines(findings)]
    write_atomically(folder / "findings.jsonl", format_json_lines(map(asdict, findings)))
    write_atomically(folder / "audit.html", render_audit(shown, recipe, tokenizer.decode))
    write_atomically(folder / "report.txt", "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"\nwrote {folder}: report.txt, findings.jsonl, audit.html (what the model reads)")
    return _decide_exit_code(recipe, legs, findings)


@dataclass
class CheckedSource:
    """A source that was looked at."""

    source: SampleSource
    samples: dict[int, Sample]
    """Samples that are well formed and whose pictures can be read, by index."""
    findings: list[DataFinding]
    image_count: int


def _unique_sources(stage_runs: list[StageRun]) -> Iterator[SampleSource]:
    """Give each source of the stages once."""
    known = set()
    for leg in stage_runs:
        for source in leg.all_sources:
            if _source_identity(source) not in known:
                known.add(_source_identity(source))
                yield source


def _source_identity(source: SampleSource) -> tuple[str, str, str, int]:
    """Return what two stages have in common if they learn from the same source."""
    images = str(getattr(source, "image_folder", ""))
    return type(source).__name__, source.name, images, len(source)


def _check_source(source: SampleSource, recipe: Recipe, template: ChatTemplate) -> CheckedSource:
    """Look at records and pictures; rendered scenes have no files and are taken as they are."""
    if not isinstance(source, FILE_SOURCES):
        return CheckedSource(source, {n: source[n] for n in range(min(len(source), 1000))}, [], 0)
    good, findings = read_valid_samples(source)
    workers = recipe.data.workers or os.cpu_count() or 1
    seen = check_images((p for sample in good.values() for p in sample.images), workers)
    findings += find_duplicates(source.name, good)
    findings += find_image_problems(source.name, good, seen)
    findings += find_odd_texts(source.name, good, template)
    findings += find_unread_keys(source.name, good)
    fine = {
        index: sample
        for index, sample in good.items()
        if not any(seen[picture].problem for picture in sample.images)
    }
    return CheckedSource(source, fine, findings, len(seen))


def _source_lines(checked_source: CheckedSource) -> Iterator[str]:
    if isinstance(checked_source.source, FILE_SOURCES):
        yield (
            f"{checked_source.source.name}: {len(checked_source.source)} records, "
            f"{checked_source.image_count} pictures"
        )
        yield from (f"  {note}" for note in getattr(checked_source.source, "notes", ()))
        yield from (f"  {note}" for note in reading_notes(checked_source.samples))
    else:
        yield (
            f"{checked_source.source.name}: rendered; {len(checked_source.samples)} of "
            f"{len(checked_source.source)} samples looked at"
        )


def _check_stage(
    stage_run: StageRun, encoder: SampleEncoder, checked_sources: list[CheckedSource]
) -> tuple[list[str], list[DataFinding], list[AuditSample]]:
    """Encode all samples as a stage would: lines of the report, findings, samples for the audit."""
    lines = [
        f"\nstage {stage_run.name}: {encoder.tokens_per_image} tokens per image, "
        f"{encoder.sample_format}"
    ]
    findings: list[DataFinding] = []
    shown: list[AuditSample] = []
    own = {_source_identity(source) for source in stage_run.all_sources}
    for one in checked_sources:
        if _source_identity(one.source) not in own:
            continue
        samples = list(one.samples.values())
        name = one.source.name
        lengths, found = encode_samples(name, stage_run.name, samples, encoder)
        findings += found
        lines += _length_lines(name, lengths, encoder.max_length)
        chosen = pick_fixed_subset(samples, min(MAX_SAMPLES_SHOWN, len(samples)))
        shown += [AuditSample(stage_run.name, sample, encoder) for sample in chosen]
    return lines, findings, shown


def _length_lines(source_name: str, lengths: StageTokenCounts, max_length: int) -> Iterator[str]:
    """Say how long the samples of a source are, with a histogram by powers of two."""
    tokens = sorted(lengths.token_counts)
    if not tokens:
        yield f"  {source_name}: nothing can be learned in this stage"
        return
    total, count = sum(tokens), len(tokens)
    yield (
        f"  {source_name}: {count} samples, {lengths.image_count} images, {total:,} tokens, "
        f"{lengths.supervised_tokens / total:.0%} of them supervised"
    )
    if lengths.skipped_samples:
        yield (
            f"    {lengths.skipped_samples} samples without an image are skipped in a stage of "
            "captions"
        )
    yield (
        f"    tokens of a sample: median {tokens[count // 2]}, 99 % up to "
        f"{tokens[min(count - 1, count * 99 // 100)]}, longest {tokens[-1]} (limit {max_length})"
    )
    bins = Counter((length - 1).bit_length() for length in tokens)
    most = max(bins.values())
    for power in range(min(bins), max(bins) + 1):
        bar = "#" * -(-40 * bins[power] // most)
        yield f"    {1 << max(0, power - 1):>6} to {1 << power:<6} {bins[power]:>8}  {bar}".rstrip()


def _summary_lines(findings: list[DataFinding]) -> Iterator[str]:
    """Say how many findings there are of each kind, and name the first."""
    if not findings:
        yield "nothing is wrong"
    for kind, meaning in KIND_MEANINGS.items():
        some = [one for one in findings if one.kind == kind]
        if some:
            yield f"{kind}: {len(some)} ({meaning})"
        for one in some[:MAX_FINDINGS_PRINTED]:
            stage = f" (stage {one.stage})" if one.stage else ""
            label = BadSample(one.sample, "").with_origin(one.source, one.record).sample_label
            yield f"  {label}: {escape_to_one_line(one.what)}{stage}"
        if len(some) > MAX_FINDINGS_PRINTED:
            yield f"  and {len(some) - MAX_FINDINGS_PRINTED} more in findings.jsonl"


def _decide_exit_code(
    recipe: Recipe, stage_runs: list[StageRun], findings: list[DataFinding]
) -> int:
    """Return 2, and say why, if training would not start with these data; else 0."""
    for leg in stage_runs:
        of_leg: list[BadSample] = []
        for source in leg.all_sources:
            refused = [
                BadSample(one.sample, one.what).with_origin(one.source, one.record)
                for one in findings
                if one.kind == REFUSED and one.source == source.name and one.stage in ("", leg.name)
            ]
            refused = list({one.record_identity: one for one in refused}.values())
            check_source_bad_samples(leg, source, refused, len(refused))
            of_leg += refused
        if leg.total_steps:
            check_caption_images(leg, of_leg)
    return 0
