"""Samples that cannot be used: how many are too many, and the file of a run that lists them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from vlbench.data.chosen_samples import ChosenSamples, base_source
from vlbench.data.optimizer_step import OptimizerStep
from vlbench.data.sample import SampleSource
from vlbench.data.shuffle import SourceMixture
from vlbench.distributed import collectives
from vlbench.errors import BadSample, UserError
from vlbench.text_files import (
    append_json_lines,
    format_json_lines,
    read_json_lines,
    write_atomically,
)
from vlbench.train.callbacks import StageCallback
from vlbench.train.run_folder import RunFolder
from vlbench.train.training_module import VLMTrainingModule


class QuarantineCallback(StageCallback):
    """Record samples that cannot be used; stop when there are too many of them."""

    def __init__(self, run: RunFolder, on_bad_sample: str, data: SourceMixture) -> None:
        """Watch the data of a stage; `on_bad_sample` is auto, quarantine or stop."""
        self.run, self.on_bad_sample = run, on_bad_sample
        self.sources_by_name = defaultdict[str, list[SampleSource]](list)
        for source in data.sources:
            self.sources_by_name[source.name].append(source)
        self.sample_count = sum(map(_count_records, self.sources_by_name.values()))
        self.known_identities = set(_read_quarantine(run))
        self.bad_count = self._count_of_stage(self.known_identities)
        self.skipped_samples = self.learned_samples = self.start_step = 0

    def on_stage_start(self, training: VLMTrainingModule) -> None:
        """Note the step that the stage starts at."""
        self.start_step = training.steps_done

    def on_step_end(self, training: VLMTrainingModule, step: OptimizerStep) -> None:
        """Record the bad samples of this step; raise if a whole stage had no good one."""
        self.skipped_samples += step.skipped_samples
        self.learned_samples += training.report.samples
        try:
            self.record_bad_samples(step.bad_samples)
            if not training.report.samples and not step.skipped_samples:
                first = step.bad_samples[0]
                raise UserError(f"every sample of step {step.index} is bad, the first: {first}")
            if (
                training.steps_done == training.total_steps
                and not self.start_step
                and not self.learned_samples
            ):
                raise UserError(
                    f"nothing was learned in {training.total_steps} steps: "
                    f"{self.skipped_samples} samples have no image in a stage of captions, "
                    "the others are bad"
                )
        except UserError as error:  # raised in all processes, which have the same bad samples
            raise collectives.error_for_rank(error) from error

    def record_bad_samples(self, bad_samples: list[BadSample]) -> None:
        """Record bad samples, each once; raise when they are too many for `on_bad_sample`."""
        new_samples = {
            sample.record_identity: sample
            for sample in bad_samples
            if sample.record_identity not in self.known_identities
        }
        self.known_identities |= set(new_samples)
        if collectives.is_rank_zero():
            _append_quarantine(self.run, list(new_samples.values()))
        self.bad_count += self._count_of_stage(new_samples)
        check_bad_samples(bad_samples, self.bad_count, self.sample_count, self.on_bad_sample)

    def _count_of_stage(self, identities: Iterable[tuple[str, int | str]]) -> int:
        """Count bad samples of this stage; other stages may have met others of its sources."""
        return sum(
            not name or any(_has_record(source, record) for source in self.sources_by_name[name])
            for name, record in identities
        )


def _count_records(parts: Sequence[SampleSource]) -> int:
    """Count the records of one source that a stage takes in parts, however often an epoch does.

    Parts that overlap count as if they did not, up to all records of the source.
    """
    return min(len(base_source(parts[0])), sum(map(len, parts)))


def _has_record(source: SampleSource, record: int | str) -> bool:
    if isinstance(source, ChosenSamples) and isinstance(record, int):
        return source.has_record(record)
    return True


def check_bad_samples(
    bad_samples: list[BadSample],
    bad_count: int,
    sample_count: int,
    on_bad_sample: str,
    counted_among: str = "",
) -> None:
    """Raise a UserError that names the first bad sample when there are too many.

    `stop` allows none, `auto` 1 in 100, `quarantine` any number while some are good. They are
    `bad_count` of `sample_count`, which `counted_among` describes where it is not the whole source.
    """
    counted_among = counted_among or f"{sample_count} samples"
    limit = {"stop": 0, "auto": sample_count // 100, "quarantine": sample_count - 1}[on_bad_sample]
    if bad_samples and bad_count > limit:
        others = f" (and {bad_count - 1} more of {counted_among})" if bad_count > 1 else ""
        advice = "Mend the data, or leave bad samples out with data.on_bad_sample=quarantine"
        if bad_count >= sample_count:
            advice = "No good sample is left"
        raise UserError(f"{bad_samples[0]}{others}. {advice}")


def quarantine_samples(run: RunFolder, bad_samples: list[BadSample]) -> None:
    """Record samples that were found bad before training began."""
    known = set(_read_quarantine(run)) if bad_samples else set()
    _append_quarantine(run, [bad for bad in bad_samples if bad.record_identity not in known])


def forget_sources(run: RunFolder, names: Collection[str]) -> None:
    """Take bad samples of sources off the record: they hold other data now."""
    lines = read_json_lines(run.quarantine_file) if names else []
    kept = [line for line in lines if line.get("source") not in names]
    if len(kept) < len(lines):
        write_atomically(run.quarantine_file, format_json_lines(kept))


def _append_quarantine(run: RunFolder, bad_samples: list[BadSample]) -> None:
    """Append bad samples to the file: `source` and `record` identify them, `id` is a label."""
    lines = [
        {
            "id": sample.sample_id,
            "reason": sample.reason,
            "source": sample.source_name,
            "record": sample.record_number,
        }
        for sample in bad_samples
    ]
    if lines:
        append_json_lines(run.quarantine_file, lines)


def _read_quarantine(run: RunFolder) -> list[tuple[str, int | str]]:
    """Return the identities of the samples that are recorded."""
    return [
        BadSample(line["id"], line["reason"])
        .with_origin(line.get("source", ""), line.get("record"))
        .record_identity
        for line in read_json_lines(run.quarantine_file)
    ]
