"""A part of a source, and instructions that are drawn for it, as a source: what a mixture takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vlbench.config.data_schema import MixtureSource, parse_sampling
from vlbench.data.conversation_files import find_bad_samples
from vlbench.data.record_choice import RecordChoice
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample, SampleSource
from vlbench.data.shard_sampler import MAX_LANES, RecentOrders
from vlbench.errors import BadSample, UserError


class ChosenSamples:
    """The samples that `sampling` and `cap` leave of a source, with `prompts` as questions.

    Which ones these are is a function of the seed and the number of samples, and the same in every
    epoch. Records keep the numbers that they have in the source.
    """

    def __init__(self, base: SampleSource, part: MixtureSource, seed: int) -> None:
        """Choose samples of `base` as `part` of a mixture says."""
        self.base, self.name, self.seed = base, base.name, seed
        self.prompts = part.prompts or ()
        self._choices: list[RecordChoice] = []
        self._pass_orders = RecentOrders[Callable[[int], int] | None]()
        sampling = parse_sampling(part.sampling)
        if sampling:
            self._choose(sampling.order, sampling.count_of(len(base)))
        self._choose("random", part.cap)

    def _choose(self, order: Any, count: int | None) -> None:
        """Keep `count` of the samples, if there are more."""
        if count is not None and count < len(self):
            blocks = self.block_counts
            counts = [len(self)] if blocks is None else blocks
            key = f"{self.seed}/choice {len(self._choices)}"
            self._choices.append(RecordChoice(counts, order, count, key))

    @property
    def block_counts(self) -> Sequence[int] | None:
        """How many samples each part has that is read at once; None where any order is as fast."""
        base_counts: Sequence[int] | None = getattr(self.base, "block_counts", None)
        if base_counts is None or not self._choices:
            return base_counts
        return self._choices[-1].block_counts

    @property
    def identity(self) -> tuple[Any, ...]:
        """What is equal for another choice of the same samples with the same questions."""
        chosen = tuple((choice.order, choice.count) for choice in self._choices)
        return chosen, self.prompts

    def __len__(self) -> int:
        return len(self._choices[-1]) if self._choices else len(self.base)

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index` (from 0) with the question of the first pass, or raise BadSample.

        Without a choice of samples, an index beyond the end is the source's to refuse.
        """
        return self.sample_in_pass(index, 0)

    def sample_in_pass(self, index: int, pass_number: int) -> Sample:
        """Return sample `index` with the question that pass `pass_number` asks about it."""
        base_index = self.base_index(index)
        sample = self.base[base_index]
        if not self.prompts:
            return sample
        key = f"{self.seed}/prompt/pass {pass_number}/record {base_index}"
        drawn = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
        return _ask(sample, self.prompts[drawn % len(self.prompts)])

    def base_index(self, index: int) -> int:
        """Return the number (from 0) that sample `index` has in the source."""
        for choice in reversed(self._choices):
            index = choice(index)
        return index

    def has_record(self, number: int) -> bool:
        """Tell whether record `number` (from 1) of the source is one of the samples."""
        index: int | None = number - 1
        for choice in self._choices:
            if index is not None:
                index = choice.find(index)
        return index is not None

    def pass_order(
        self, shuffle_key: str, max_lanes: int = MAX_LANES
    ) -> Callable[[int], int] | None:
        """Return the order of a pass over the samples; None where any order is as fast."""
        return self._pass_orders.find(
            shuffle_key, max_lanes, lambda: self._make_order(shuffle_key, max_lanes)
        )

    def _make_order(self, shuffle_key: str, max_lanes: int) -> Callable[[int], int] | None:
        own_order: Any = getattr(self.base, "pass_order", None)
        if own_order is None:
            return None
        counts = np.asarray(self._choices[-1].block_counts) if self._choices else None
        used = None if counts is None else counts[counts > 0]
        order: Callable[[int], int] | None = own_order(shuffle_key, used, max_lanes)
        return order

    def find_bad_samples(
        self,
        indices: Sequence[int] | None = None,
        on_sample: Callable[[Sample], None] | None = None,
    ) -> list[BadSample]:
        """Return the bad samples of files, as `ConversationFiles.find_bad_samples`."""
        return find_bad_samples(self, indices, on_sample)


def take_part(base: SampleSource, part: MixtureSource, seed: int) -> tuple[SampleSource, float]:
    """Return what a mixture takes of an open source, and how often an epoch takes each sample.

    A UserError for a source without samples.
    """
    if not len(base):
        raise UserError(f"data {base.name!r} holds no samples")
    is_whole = part.sampling == "all" and part.cap is None and not part.prompts
    if is_whole:
        return base, part.weight
    uncapped = ChosenSamples(base, part.model_copy(update={"cap": None}), seed)
    chosen = ChosenSamples(base, part, seed)
    wanted = len(uncapped) * part.weight
    return chosen, min(wanted, part.cap or wanted) / len(chosen)


def base_source(source: SampleSource) -> Any:
    """Return the source itself, of which `source` may be a part."""
    return source.base if isinstance(source, ChosenSamples) else source


def source_identity(source: SampleSource) -> tuple[Any, ...]:
    """Return a key that is equal for the same samples of two stages."""
    base = base_source(source)
    chosen = source.identity if isinstance(source, ChosenSamples) else ((), ())
    images = str(getattr(base, "image_folder", ""))
    return type(base).__name__, base.name, images, len(source), *chosen


def _ask(sample: Sample, prompt: str) -> Sample:
    """Return a sample with `prompt` as its question, behind its images."""
    places = [place for place, turn in enumerate(sample.turns) if turn.role == "human"]
    if len(places) != 1:
        reason = f"has {len(places)} questions; prompts are for captions, which have one"
        raise BadSample(sample.id, reason)
    images = IMAGE_PLACEHOLDER * len(sample.images)
    text = f"{images}\n{prompt}" if images else prompt
    turns = list(sample.turns)
    turns[places[0]] = ChatTurn("human", text)
    return replace(sample, turns=tuple(turns))
