"""`python -m vlbench check recipe=... data.train=FILE`: check all data, write the findings."""

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
from vlbench.check.supervision_audit import AuditSample, choose_samples, render_audit
from vlbench.config.schema import Recipe
from vlbench.data.chat_template import CHAT_TEMPLATES, ChatTemplate
from vlbench.data.conversation_files import ConversationFiles
from vlbench.data.image_processing import ImageTransform
from vlbench.data.sample import Sample, SampleSource
from vlbench.data.sample_encoding import CachedTokenizer, SampleEncoder
from vlbench.data.shards import WebDatasetShards
from vlbench.data.tokenizer import Tokenizer
from vlbench.errors import BadSample, escape_to_one_line
from vlbench.model.language_model import tokenizer_folder
from vlbench.system_errors import explain_unwritable
from vlbench.text_files import format_json_lines, write_atomically, write_for_people
from vlbench.train.run_report import stage_label
from vlbench.train.shape_checks import image_transforms_by_stage, tokens_per_image_by_stage
from vlbench.train.stage_plan import (
    StageRun,
    check_caption_images,
    check_source_bad_samples,
    plan_stage_runs,
)

FILE_SOURCES = (ConversationFiles, WebDatasetShards)  # sources that read files; scenes are rendered
MAX_FINDINGS_PRINTED = 5  # of each kind; all are in findings.jsonl
MAX_SAMPLES_SHOWN = 6  # on the audit page, of each source in each stage
MAX_RENDERED_SAMPLES = 1000  # of a source of rendered scenes


def run_check(recipe: Recipe, folder: Path) -> int:
    """Check the data of a recipe's stages, print a summary, write findings.jsonl and audit.html.

    Returns:
        The exit code 0.

    Raises:
        UserError: training would not start with these data, or `folder` cannot be written.
    """
    stage_runs = plan_stage_runs(recipe)
    tokens_per_image = tokens_per_image_by_stage(recipe.model, stage_runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain_unwritable(error, f"out={folder}") from error
    tokenizer = Tokenizer.load(tokenizer_folder(recipe.language.weights))
    template = CHAT_TEMPLATES[recipe.language.template].bind_eos(tokenizer.eos_token)
    workers = recipe.data.workers or os.cpu_count() or 1
    checked_sources = [
        _check_source(source, workers, template) for source in _unique_sources(stage_runs)
    ]
    findings = [finding for checked in checked_sources for finding in checked.findings]
    lines = [line for checked in checked_sources for line in _source_lines(checked)]
    audit_samples: list[AuditSample] = []
    cached_tokenizer = CachedTokenizer(tokenizer)
    transforms = image_transforms_by_stage(recipe.model, stage_runs)
    for stage_run, stage_tokens_per_image, transform in zip(
        stage_runs, tokens_per_image, transforms, strict=True
    ):
        encoder = SampleEncoder(
            cached_tokenizer,
            template,
            stage_tokens_per_image,
            recipe.language.max_length,
            stage_run.stage.sample_format,
        )
        stage_lines, stage_findings, stage_samples = _check_stage(
            stage_run, encoder, transform, checked_sources
        )
        lines += stage_lines
        findings += stage_findings
        audit_samples += stage_samples
    findings = list(dict.fromkeys(findings))
    lines += ["", *_summary_lines(findings)]
    template_name = recipe.language.template
    settings = f"Recipe {recipe.recipe}, size {recipe.size}, template {template_name}"
    write_atomically(folder / "findings.jsonl", format_json_lines(map(asdict, findings)))
    page = render_audit(audit_samples, recipe.recipe, settings, tokenizer.decode)
    write_for_people(folder / "audit.html", page)
    write_for_people(folder / "report.txt", "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"\nwrote {folder}: report.txt, findings.jsonl, audit.html (what the model reads)")
    _refuse_bad_data(stage_runs, findings)
    return 0


@dataclass
class CheckedSource:
    """A source with its findings."""

    source: SampleSource
    samples: dict[int, Sample]
    """Index -> sample, of those that are well formed and whose images can be read."""
    findings: list[DataFinding]
    image_count: int


def _unique_sources(stage_runs: list[StageRun]) -> Iterator[SampleSource]:
    """Yield each source of the stages once."""
    seen = set()
    for stage_run in stage_runs:
        for source in stage_run.all_sources:
            if _source_identity(source) not in seen:
                seen.add(_source_identity(source))
                yield source


def _source_identity(source: SampleSource) -> tuple[str, str, str, int]:
    """Return a key that is equal for the same source of two stages."""
    images = str(getattr(source, "image_folder", ""))
    return type(source).__name__, source.name, images, len(source)


def _check_source(source: SampleSource, workers: int, template: ChatTemplate) -> CheckedSource:
    """Check records and images of a source; rendered scenes have no files and no findings."""
    if not isinstance(source, FILE_SOURCES):
        count = min(len(source), MAX_RENDERED_SAMPLES)
        return CheckedSource(source, {index: source[index] for index in range(count)}, [], 0)
    samples, findings = read_valid_samples(source)
    images = (image for sample in samples.values() for image in sample.images)
    image_checks = check_images(images, workers)
    findings += find_duplicates(source.name, samples)
    findings += find_image_problems(source.name, samples, image_checks)
    findings += find_odd_texts(source.name, samples, template)
    findings += find_unread_keys(source.name, samples)
    readable = {
        index: sample
        for index, sample in samples.items()
        if not any(image_checks[image].problem for image in sample.images)
    }
    return CheckedSource(source, readable, findings, len(image_checks))


def _source_lines(checked_source: CheckedSource) -> Iterator[str]:
    if isinstance(checked_source.source, FILE_SOURCES):
        yield (
            f"{checked_source.source.name}: {len(checked_source.source)} records, "
            f"{checked_source.image_count} images"
        )
        yield from (f"  {note}" for note in getattr(checked_source.source, "notes", ()))
        yield from (f"  {note}" for note in reading_notes(checked_source.samples))
    else:
        yield (
            f"{checked_source.source.name}: rendered; {len(checked_source.samples)} of "
            f"{len(checked_source.source)} samples checked"
        )


def _check_stage(
    stage_run: StageRun,
    encoder: SampleEncoder,
    transform: ImageTransform,
    checked_sources: list[CheckedSource],
) -> tuple[list[str], list[DataFinding], list[AuditSample]]:
    """Encode all samples as a stage does; return report lines, findings and audit samples."""
    lines = [
        f"\nstage {stage_label(stage_run.name, stage_run.stage.image_size)}: "
        f"{encoder.tokens_per_image} tokens per image, "
        f"{encoder.sample_format}"
    ]
    findings: list[DataFinding] = []
    audit_samples: list[AuditSample] = []
    identities = {_source_identity(source) for source in stage_run.all_sources}
    for checked in checked_sources:
        if _source_identity(checked.source) not in identities:
            continue
        samples = list(checked.samples.values())
        name = checked.source.name
        token_counts, stage_findings = encode_samples(name, stage_run.name, samples, encoder)
        findings += stage_findings
        lines += _length_lines(name, token_counts, encoder.max_length)
        chosen = choose_samples(samples, MAX_SAMPLES_SHOWN)
        audit_samples += [
            AuditSample(stage_run.name, sample, encoder, transform) for sample in chosen
        ]
    return lines, findings, audit_samples


def _length_lines(source_name: str, lengths: StageTokenCounts, max_length: int) -> Iterator[str]:
    """Yield lines on the lengths of a source's samples, with a histogram by powers of two."""
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
    yield (
        f"    tokens of a sample: median {tokens[count // 2]}, 99 % up to "
        f"{tokens[min(count - 1, count * 99 // 100)]}, longest {tokens[-1]} (limit {max_length})"
    )
    bins = Counter((length - 1).bit_length() for length in tokens)
    largest = max(bins.values())
    for power in range(min(bins), max(bins) + 1):
        bar = "#" * -(-40 * bins[power] // largest)
        yield f"    {1 << max(0, power - 1):>6} to {1 << power:<6} {bins[power]:>8}  {bar}".rstrip()


def _summary_lines(findings: list[DataFinding]) -> Iterator[str]:
    """Yield lines with the number of findings of each kind and the first of them."""
    if not findings:
        yield "nothing is wrong"
    for kind, meaning in KIND_MEANINGS.items():
        of_kind = [finding for finding in findings if finding.kind == kind]
        if of_kind:
            yield f"{kind}: {len(of_kind)} ({meaning})"
        for finding in of_kind[:MAX_FINDINGS_PRINTED]:
            stage = f" (stage {finding.stage})" if finding.stage else ""
            bad_sample = BadSample(finding.sample, "").with_origin(finding.source, finding.record)
            yield f"  {bad_sample.sample_label}: {escape_to_one_line(finding.what)}{stage}"
        if len(of_kind) > MAX_FINDINGS_PRINTED:
            yield f"  and {len(of_kind) - MAX_FINDINGS_PRINTED} more in findings.jsonl"


def _refuse_bad_data(stage_runs: list[StageRun], findings: list[DataFinding]) -> None:
    """Raise the UserError with which training would refuse to start with these data, if any."""
    for stage_run in stage_runs:
        bad_samples_of_stage: list[BadSample] = []
        for source in stage_run.all_sources:
            refused = [
                BadSample(finding.sample, finding.what).with_origin(finding.source, finding.record)
                for finding in findings
                if finding.kind == REFUSED
                and finding.source == source.name
                and finding.stage in ("", stage_run.name)
            ]
            refused = list({bad.record_identity: bad for bad in refused}.values())
            check_source_bad_samples(stage_run, source, refused, len(refused))
            bad_samples_of_stage += refused
        if stage_run.total_steps:
            check_caption_images(stage_run, bad_samples_of_stage)
