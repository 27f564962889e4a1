"""`python -m vlbench check recipe=... data.train=FILE`: check all data, write the findings."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlbench.check.findings import KIND_MEANINGS, MAX_FINDINGS_PRINTED, FindingLog
from vlbench.check.mixture_shares import share_lines
from vlbench.check.sample_checks import StageCheck
from vlbench.check.source_pass import GoodSamples, SourcePass, SourceSummary
from vlbench.check.supervision_audit import AuditSample, choose_samples, render_audit
from vlbench.config.schema import Recipe
from vlbench.data.chat_template import ChatTemplate
from vlbench.data.chosen_samples import base_source, source_identity
from vlbench.data.conversation_files import ConversationFiles
from vlbench.data.own_template import bind_template
from vlbench.data.preflight import PreflightReport
from vlbench.data.sample import SampleSource
from vlbench.data.sample_encoding import CachedTokenizer, SampleEncoder
from vlbench.data.shards import WebDatasetShards
from vlbench.data.tokenizer import Tokenizer
from vlbench.errors import escape_to_one_line
from vlbench.model.build_vlm import read_view_settings
from vlbench.model.language_model import tokenizer_folder
from vlbench.model.view_tokens import connector_layout
from vlbench.system_errors import explain_unwritable
from vlbench.text_files import replace_when_written, write_for_people
from vlbench.train.run_report import describe_template, stage_label
from vlbench.train.shape_checks import connectors_by_stage, image_transforms_by_stage
from vlbench.train.stage_plan import (
    StageRun,
    check_source_bad_samples,
    plan_stage_runs,
    refuse_missing_images,
)
from vlbench.train.view_report import describe_reduced, describe_view_counts

FILE_SOURCES = (ConversationFiles, WebDatasetShards)  # they read files; scenes are rendered
MAX_SAMPLES_SHOWN = 6  # on the audit page, of each source in each stage
MAX_RENDERED_SAMPLES = 1000  # of a source of rendered scenes

SourceIdentity = tuple[Any, ...]
StageChecks = dict[tuple[int, SourceIdentity], StageCheck]
"""By the number of the stage, and the source."""
SourceSummaries = dict[SourceIdentity, SourceSummary]


def run_check(recipe: Recipe, folder: Path) -> int:
    """Check the data of a recipe's stages, print a summary, write findings.jsonl and audit.html.

    Returns:
        The exit code 0.

    Raises:
        UserError: training would not start with these data, or `folder` cannot be written.
    """
    stage_runs = plan_stage_runs(recipe.selected_data, recipe.last_stage_data)
    connectors = connectors_by_stage(recipe.model, stage_runs)
    transforms = image_transforms_by_stage(recipe.model, stage_runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain_unwritable(error, f"out={folder}") from error
    tokenizer = Tokenizer.load(tokenizer_folder(recipe.language.weights))
    template = bind_template(recipe.language.template, tokenizer)
    cached_tokenizer = CachedTokenizer(tokenizer)
    view_settings = read_view_settings(recipe.vision)
    encoders = [
        SampleEncoder(
            cached_tokenizer,
            template,
            connector.tokens_per_image,
            recipe.language.max_length,
            stage_run.stage.sample_format,
            view_layout=connector_layout(
                connector, view_settings, transform.crop, recipe.model.apply_exif
            ),
        )
        for stage_run, connector, transform in zip(stage_runs, connectors, transforms, strict=True)
    ]
    checks = _stage_checks(stage_runs, encoders)
    workers = recipe.data.workers or os.cpu_count() or 1
    with (
        replace_when_written(folder / "findings.jsonl") as temporary,
        temporary.open("w", encoding="utf-8", newline="") as findings,
    ):
        log = FindingLog(findings)
        summaries = {
            source_identity(source): _check_source(source, checks, template, log, workers)
            for source in _unique_sources(stage_runs)
        }
    lines = [line for summary in summaries.values() for line in _source_lines(summary)]
    lines.append(describe_template(template, tokenizer))
    lines += _stage_lines(stage_runs, checks, summaries)
    lines += ["", *_summary_lines(log)]
    settings = f"Recipe {recipe.recipe}, size {recipe.size}, template {recipe.language.template}"
    audit_samples = [
        AuditSample(stage_run.name, sample, encoder, transform)
        for stage_run, encoder, transform in zip(stage_runs, encoders, transforms, strict=True)
        for identity in _stage_identities(stage_run)
        for sample in choose_samples(GoodSamples(summaries[identity]), MAX_SAMPLES_SHOWN)
    ]
    page = render_audit(audit_samples, recipe.recipe, settings, tokenizer.decode)
    write_for_people(folder / "audit.html", page)
    write_for_people(folder / "report.txt", "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"\nwrote {folder}: report.txt, findings.jsonl, audit.html (what the model reads)")
    _refuse_bad_data(stage_runs, checks, summaries)
    return 0


def _check_source(
    source: SampleSource,
    checks: StageChecks,
    template: ChatTemplate,
    log: FindingLog,
    workers: int,
) -> SourceSummary:
    """Check a source as all stages read it; rendered scenes have no files and no findings."""
    identity = source_identity(source)
    of_source = [check for (_, of), check in checks.items() if of == identity]
    source_pass = SourcePass(source, of_source, template, log, workers)
    if isinstance(base_source(source), FILE_SOURCES):
        return source_pass.check_files()
    return source_pass.check_rendered(MAX_RENDERED_SAMPLES)


def _stage_checks(stage_runs: list[StageRun], encoders: list[SampleEncoder]) -> StageChecks:
    return {
        (number, source_identity(source)): StageCheck(stage_run.name, source.name, encoder)
        for number, (stage_run, encoder) in enumerate(zip(stage_runs, encoders, strict=True))
        for source in stage_run.all_sources
    }


def _stage_identities(stage_run: StageRun) -> Iterator[SourceIdentity]:
    yield from dict.fromkeys(map(source_identity, stage_run.all_sources))


def _unique_sources(stage_runs: list[StageRun]) -> Iterator[SampleSource]:
    """Yield each source of the stages once."""
    seen = set()
    for stage_run in stage_runs:
        for source in stage_run.all_sources:
            if source_identity(source) not in seen:
                seen.add(source_identity(source))
                yield source


def _source_lines(summary: SourceSummary) -> Iterator[str]:
    source, base = summary.source, base_source(summary.source)
    if isinstance(base, FILE_SOURCES):
        of_all = f" of {len(base)}" if len(source) < len(base) else ""
        yield f"{source.name}: {len(source)}{of_all} records, {summary.image_count} images"
        yield from (f"  {note}" for note in getattr(base, "notes", ()))
        yield from (f"  {note}" for note in summary.reading_notes())
    else:
        count = len(summary.good_indices)
        yield f"{source.name}: rendered; {count} of {len(source)} samples checked"


def _stage_lines(
    stage_runs: list[StageRun],
    checks: StageChecks,
    summaries: SourceSummaries,
) -> Iterator[str]:
    for number, stage_run in enumerate(stage_runs):
        of_stage = [check for (of, _), check in checks.items() if of == number]
        encoder = of_stage[0].encoder
        yield (
            f"\nstage {stage_label(stage_run.name, stage_run.stage.image_size)}: "
            f"{encoder.tokens_per_image} tokens per {'view' if encoder.view_layout else 'image'}, "
            f"{encoder.sample_format}"
        )
        for check in of_stage:
            yield from _length_lines(check)
        if len(stage_run.data.sources) > 1:
            mixed = list(map(source_identity, stage_run.data.sources))
            checks_of_mixed = [checks[number, identity] for identity in mixed]
            yield from share_lines(
                stage_run.data, checks_of_mixed, [summaries[identity] for identity in mixed]
            )


def _length_lines(lengths: StageCheck) -> Iterator[str]:
    """Yield lines on the lengths of a source's samples, with a histogram by powers of two."""
    source_name, max_length = lengths.source_name, lengths.encoder.max_length
    tokens = sorted(lengths.token_counts)
    if not tokens:
        yield f"  {source_name}: no sample can be learned from in this stage"
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
    told = lengths.beyond_captions.describe(f"{count} samples")
    if told:
        yield f"    {told}"
    yield (
        f"    tokens of a sample: median {tokens[count // 2]}, 99 % up to "
        f"{tokens[min(count - 1, count * 99 // 100)]}, longest {tokens[-1]} (limit {max_length})"
    )
    yield from _view_lines(lengths)
    bins = Counter((length - 1).bit_length() for length in tokens)
    largest = max(bins.values())
    for power in range(min(bins), max(bins) + 1):
        bar = "#" * -(-40 * bins[power] // largest)
        yield f"    {1 << max(0, power - 1):>6} to {1 << power:<6} {bins[power]:>8}  {bar}".rstrip()


def _view_lines(check: StageCheck) -> Iterator[str]:
    """Yield how many views images have, and how many samples have fewer than they could."""
    if not check.view_counts:
        return
    yield f"    views of an image: {describe_view_counts(check.view_counts)}"
    if check.reduced_samples:
        yield f"    {describe_reduced(check.reduced_samples, len(check.token_counts))}"


def _summary_lines(log: FindingLog) -> Iterator[str]:
    """Yield lines with the number of findings of each kind and the first of them."""
    if not log.counts:
        yield "nothing is wrong"
    for kind, meaning in KIND_MEANINGS.items():
        if log.counts[kind]:
            yield f"{kind}: {log.counts[kind]} ({meaning})"
        for finding in log.first_ones[kind]:
            stage = f" (stage {finding.stage})" if finding.stage else ""
            label = finding.as_bad_sample().sample_label
            yield f"  {label}: {escape_to_one_line(finding.what)}{stage}"
        if log.counts[kind] > MAX_FINDINGS_PRINTED:
            yield f"  and {log.counts[kind] - MAX_FINDINGS_PRINTED} more in findings.jsonl"


def _refuse_bad_data(
    stage_runs: list[StageRun],
    checks: StageChecks,
    summaries: SourceSummaries,
) -> None:
    """Raise the UserError with which training would refuse to start with these data, if any."""
    for number, stage_run in enumerate(stage_runs):
        for source in stage_run.all_sources:
            refused = summaries[source_identity(source)].refused
            first, count = refused.of_stage(stage_run.name)
            size = len(source)
            report = PreflightReport(first, size, size, further_bad_samples=count - len(first))
            check_source_bad_samples(stage_run, source, report)
        images = sum(
            checks[number, source_identity(source)].image_count for source in stage_run.data.sources
        )
        is_caption_stage = stage_run.stage.sample_format == "caption"
        if stage_run.total_steps and is_caption_stage and not images:
            refuse_missing_images(stage_run)
