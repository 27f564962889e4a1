"""What a mixture takes of its sources: choices, caps, prompts, an order that reads few shards."""

from __future__ import annotations

import pickle
import tracemalloc
from collections import Counter
from collections.abc import Sequence

import pytest

from vlbench.config.data_schema import MixtureSource
from vlbench.data.chosen_samples import ChosenSamples, source_identity, take_part
from vlbench.data.record_choice import RecordChoice
from vlbench.data.sample import ChatTurn, Sample, record_number, sample_at
from vlbench.data.shard_sampler import MAX_LANES, ShardShuffle
from vlbench.data.shuffle import SourceMixture
from vlbench.errors import BadSample


class Captions:
    """A source whose samples have their numbers as answers, in blocks where they are given."""

    def __init__(self, count: int, blocks: Sequence[int] | None = None, questions: int = 1):
        self.name, self.count, self.block_counts = "captions", count, blocks
        self.questions = questions

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(index)
        turn = ChatTurn("human", "What?"), ChatTurn("assistant", str(index))
        return Sample(f"s{index}", turn * self.questions)

    def pass_order(
        self,
        shuffle_key: str,
        block_counts: Sequence[int] | None = None,
        max_lanes: int = MAX_LANES,
    ) -> ShardShuffle | None:
        if self.block_counts is None:
            return None
        counts = self.block_counts if block_counts is None else block_counts
        return ShardShuffle(counts, shuffle_key, max_lanes=max_lanes)


def part(**settings: object) -> MixtureSource:
    return MixtureSource.model_validate({"train": "x", **settings})


def chosen_numbers(source: Captions, seed: int = 0, **settings: object) -> list[int]:
    """Return the records of a part, and check that reports and the sample agree on them."""
    chosen = ChosenSamples(source, part(**settings), seed)
    numbers = [int(chosen[index].turns[1].text) for index in range(len(chosen))]
    assert [record_number(chosen, index) - 1 for index in range(len(chosen))] == numbers
    assert len(set(numbers)) == len(numbers)
    found = {number for number in range(len(source)) if chosen.has_record(number + 1)}
    assert found == set(numbers)
    return numbers


BLOCKS = [3, 50, 0, 7, 40]


@pytest.mark.parametrize("blocks", [None, BLOCKS])
def test_first_and_end_are_what_llava_onevision_takes(blocks: list[int] | None) -> None:
    source = Captions(100, blocks)
    assert chosen_numbers(source, sampling="first:12") == list(range(12))
    assert chosen_numbers(source, sampling="end:30") == list(range(70, 100))
    assert chosen_numbers(source, sampling="first:1000") == list(range(100))
    assert chosen_numbers(source, sampling="end:2.5%") == [97, 98, 99]


@pytest.mark.parametrize("blocks", [None, BLOCKS])
def test_a_random_choice_is_fixed_by_the_seed(blocks: list[int] | None) -> None:
    source = Captions(100, blocks)
    one = chosen_numbers(source, sampling="random:30")
    assert len(one) == 30 and one == chosen_numbers(source, sampling="30%")
    assert set(one) != set(chosen_numbers(source, seed=1, sampling="random:30"))
    assert set(one) != set(range(30))
    assert set(chosen_numbers(source, cap=30)) == set(one)
    both = chosen_numbers(source, sampling="end:50", cap=20)
    assert len(both) == 20 and set(both) < set(range(50, 100))


def test_a_random_choice_takes_the_same_share_of_every_shard() -> None:
    blocks = [100] * 10 + [10]
    numbers = chosen_numbers(Captions(1010, blocks), sampling="random:10%")
    shares = Counter(number // 100 for number in numbers)
    assert [shares[shard] for shard in range(11)] == [10] * 10 + [1]


def test_a_choice_of_a_billion_records_is_made_of_numbers_alone() -> None:
    tracemalloc.start()
    choice = RecordChoice([10_000] * 100_000, "random", 100_000_000, "0")
    places = [choice(index) for index in range(0, 100_000_000, 9_999_991)]
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    assert len(set(places)) == len(places) == 11 and max(places) < 1_000_000_000
    with pytest.raises(IndexError):
        choice(100_000_000)


def epoch_counts(mixture: SourceMixture, epoch: int) -> Counter[tuple[int, str]]:
    positions = range(epoch * len(mixture), (epoch + 1) * len(mixture))
    samples = [mixture[position] for position in positions]
    return Counter((one.origin.source_index, one.id) for one in samples if one.origin)


@pytest.mark.parametrize("blocks", [None, [400, 200]])
def test_shares_are_exact_and_a_cap_holds_in_every_epoch(blocks: list[int] | None) -> None:
    parts = [
        (Captions(600, blocks), part(cap=100)),
        (Captions(40), part(weight=1.5)),
        (Captions(60), part(weight=5, cap=140)),
        (Captions(80), part(weight=0.5)),
        (Captions(200, [200]), part(sampling="end:10%", weight=2)),
    ]
    mixture = SourceMixture([take_part(source, one, 7) for source, one in parts], 7)
    assert mixture.epoch_shares == [100, 60, 140, 40, 40]
    epochs = [epoch_counts(mixture, epoch) for epoch in range(3)]
    for counts in epochs:
        by_source = Counter[int]()
        for (source, _), times in counts.items():
            by_source[source] += times
        assert [by_source[number] for number in range(5)] == mixture.epoch_shares
        assert {times for (source, _), times in counts.items() if source == 4} == {2}
    assert epochs[0].keys() != epochs[1].keys()  # of weight 0.5, the other half
    capped = [{one for source, one in counts if source == 0} for counts in epochs]
    assert capped[0] == capped[1] == capped[2] and len(capped[0]) == 100


def test_a_mixture_of_parts_travels_to_a_worker_and_any_position_is_found_alone() -> None:
    def make() -> SourceMixture:
        parts = [(Captions(64, [16] * 4), part(cap=20, prompts=["a", "b"])), (Captions(9), part())]
        return SourceMixture([take_part(source, one, 3) for source, one in parts], 3)

    whole = [make()[position] for position in range(100)]
    copy = pickle.loads(pickle.dumps(make()))
    for position in (99, 3, 57, 28, 29, 0):
        assert make()[position] == copy[position] == whole[position]


def test_prompts_are_drawn_by_seed_pass_and_sample() -> None:
    prompts = ["one", "two", "three"]

    def drawn(seed: int) -> list[tuple[str, str]]:
        mixture = SourceMixture([take_part(Captions(50), part(prompts=prompts), seed)], 0)
        samples = [mixture[position] for position in range(3 * 50)]
        return [(sample.id, sample.turns[0].text) for sample in samples]

    first = drawn(1)
    assert first == drawn(1) and first != drawn(2)
    epochs = [dict(first[start : start + 50]) for start in (0, 50, 100)]
    assert all(set(epoch.values()) == set(prompts) for epoch in epochs)
    assert 10 < sum(epochs[0][name] != epochs[1][name] for name in epochs[0])
    assert {text for _, text in first} == set(prompts)


def test_a_prompt_stands_behind_the_images_and_never_instead_of_several_questions() -> None:
    class Pictures(Captions):
        def __getitem__(self, index: int) -> Sample:
            turns = ChatTurn("human", "<image_placeholder>\nOld"), ChatTurn("assistant", "new")
            return Sample("s", turns, ("picture",))  # type: ignore[arg-type]

    asked = ChosenSamples(Pictures(1), part(prompts=["Say it."]), 0)[0]
    assert asked.turns[0].text == "<image_placeholder>\nSay it."
    several = ChosenSamples(Captions(4, questions=2), part(prompts=["Say it."], cap=2), 0)
    with pytest.raises(BadSample, match="has 2 questions; prompts are for captions") as raised:
        sample_at(several, 0)
    assert raised.value.record_number == record_number(several, 0)


def test_parts_of_one_source_are_told_apart() -> None:
    source = Captions(10)
    settings = [{}, {"cap": 5}, {"sampling": "first:5"}, {"prompts": ["a"]}, {"cap": 20}]
    parts = [take_part(source, part(**one), 0)[0] for one in settings]
    assert len({source_identity(one) for one in parts}) == 4  # a cap of 20 takes all


@pytest.mark.parametrize("with_others", [False, True])
def test_a_rank_reads_few_shards_at_a_time(with_others: bool) -> None:
    """A random order of the epoch on top of the shards' own would have a rank read all of them."""
    shards = Captions(256_000, [1000] * 256)
    sources = [(shards, 1.0), (Captions(60_000), 1.0)] if with_others else [(shards, 1.0)]
    mixture = SourceMixture(sources, 0)  # type: ignore[arg-type]
    rank_of_128 = [mixture.locate_sample(position) for position in range(5, 128 * 100, 128)]
    read = [index // 1000 for source, index in rank_of_128 if source == 0]
    assert len(read) > 60 and len(set(read)) <= (32 if with_others else 4)


def test_sources_take_turns_evenly() -> None:
    sources = [(Captions(50_000, [50_000]), 1.0), (Captions(150_000), 1.0), (Captions(7), 1.0)]
    mixture = SourceMixture(sources, 0)  # type: ignore[arg-type]
    for start in (0, 77_000, 199_000):
        of_first = [mixture.locate_sample(start + number)[0] for number in range(400)].count(0)
        assert 60 < of_first < 140
