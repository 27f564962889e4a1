"""The model: samples do not touch each other, hooks change nothing until they are trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden_release import CHECKPOINT
from PIL import Image
from random_vlm import make_batch, make_sample, small_vlm
from torch import Tensor, nn

import vlbench
from vlbench.connector import registry
from vlbench.connector.base import Connector, ImagePlaces, Shapes
from vlbench.contract_checks.gradient_comparison import find_differences, language_gradients
from vlbench.contract_checks.small_model import extend_prompt
from vlbench.errors import UserError

LlavaMLP = registry.load_connector("llava_mlp")


class Gated(Connector):
    """A minimal injecting connector: a gate per layer, closed at the start."""

    replaces_image_tokens = False

    def __init__(self, shapes: Shapes, gate: float = 0.0) -> None:
        super().__init__()
        self.inject_layers = (0, 2)
        self.image_embedding = nn.Parameter(torch.randn(shapes.lm_width))
        self.proj = nn.Linear(shapes.vision_width, shapes.lm_width)
        self.gate = nn.Parameter(torch.full((3,), gate))

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features)

    def inject(self, layer: int, hidden: Tensor, visual: Tensor, where: ImagePlaces) -> Tensor:
        sees = where.image_index
        seen = visual.mean(1)[sees.clamp(min=0)] * (sees >= 0).unsqueeze(-1)
        return hidden + torch.tanh(self.gate[layer]) * seen


class Stateful(Connector):
    """Counts what it has seen, and drops inputs, while it is trained."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.tokens_per_image = shapes.patches
        self.norm, self.dropout = nn.BatchNorm1d(shapes.patches), nn.Dropout(0.5)
        self.proj = nn.Linear(shapes.vision_width, shapes.lm_width)

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(self.dropout(self.norm(features)))


def test_a_frozen_connector_is_in_evaluation_mode() -> None:
    """Else its buffers would change, which no checkpoint of a stage that freezes it has."""
    vlm = small_vlm(Stateful)
    batch = make_batch(vlm, [[make_sample(1), make_sample(2)]])
    before = {name: value.clone() for name, value in vlm.connector.state_dict().items()}
    vlm.connector.requires_grad_(False)
    vlm.train()
    assert vlm(batch).loss_sum.equal(vlm(batch).loss_sum)
    after = vlm.connector.state_dict()
    assert all(after[name].equal(value) for name, value in before.items())
    vlm.connector.requires_grad_(True)
    vlm.train()
    assert not vlm(batch).loss_sum.equal(vlm(batch).loss_sum)
    assert not vlm.connector.norm.running_mean.equal(before["norm.running_mean"])


def assert_same(ours: tuple, theirs: tuple, tolerance: float = 1e-5) -> None:
    """Compare loss and gradients."""
    assert find_differences(ours, theirs, tolerance) == []


@pytest.mark.parametrize(("connector", "options"), [(LlavaMLP, {}), (Gated, {"gate": 0.5})])
def test_a_sample_does_not_notice_its_neighbours(connector: type, options: dict) -> None:
    vlm = small_vlm(connector, options)
    samples = [
        make_sample(1),
        make_sample(2, images=2, words=40),
        make_sample(3, images=0),
        make_sample(4, words=1),
    ]
    kind = torch.float32
    if connector is Gated:  # the gradient of a gate is a long sum that cancels: compare in float64
        vlm, kind = vlm.to(torch.float64), torch.float64

    def of(rows: list) -> tuple:
        return language_gradients(vlm, [make_batch(vlm, part).to("cpu", kind) for part in rows])

    alone = of([[[one]] for one in samples])
    for other in ([[samples]], [[samples[::-1]]], [[[one] for one in samples]]):
        assert_same(alone, of(other))


def test_four_micro_batches_equal_one_batch() -> None:
    vlm = small_vlm(LlavaMLP)
    samples = [make_sample(n, images=n % 3, words=1 + 3 * (n % 13)) for n in range(32)]
    whole = language_gradients(vlm, [make_batch(vlm, [samples])])
    parts = language_gradients(
        vlm, [make_batch(vlm, [samples[i : i + 8]]) for i in range(0, 32, 8)]
    )
    assert_same(whole, parts)


@pytest.mark.parametrize(("connector", "options"), [(LlavaMLP, {}), (Gated, {"gate": 0.5})])
def test_text_alone_still_gives_every_parameter_a_gradient(connector: type, options: dict) -> None:
    vlm = small_vlm(connector, options)
    _, grads = language_gradients(vlm, [make_batch(vlm, [[make_sample(1, images=0)]])])
    missing = {n for n, _ in vlm.connector.named_parameters() if f"connector.{n}" not in grads}
    assert not missing
    used = {id(p) for p in vlm.vision.used_parameters()}
    encoders = {f"vision.{n}" for n, p in vlm.vision.named_parameters() if id(p) in used}
    assert encoders <= grads.keys()


def test_closed_gates_equal_the_plain_language_model_bit_for_bit() -> None:
    vlm = small_vlm(Gated)
    batch = make_batch(vlm, [[make_sample(1), make_sample(2, images=2)]])
    batch.labels = None
    with torch.no_grad():
        ours = vlm(batch).logits
        embeds = vlm.model.merge_embeddings(batch, vlm.visual(batch))
        plain = vlm.language.model(
            inputs_embeds=embeds,
            position_ids=batch.position_ids,
            lengths=batch.sample_lengths,
            visual=vlm.visual(batch),
            image_index=batch.image_index,
            token_index=batch.image_index,
        ).last_hidden_state
        for hook in vlm.model._inject_hooks:
            hook.remove()
        bare = vlm.language.model(
            inputs_embeds=embeds, position_ids=batch.position_ids, lengths=batch.sample_lengths
        ).last_hidden_state
    assert torch.equal(plain, bare)
    assert torch.equal(ours, vlm.language.lm_head(bare))
    assert set(vlm.language.state_dict()) == set(small_vlm(LlavaMLP).language.state_dict())


def test_visual_tokens_equal_the_same_embeddings_put_by_hand() -> None:
    vlm = small_vlm(LlavaMLP)
    batch = make_batch(vlm, [[make_sample(1)]])
    batch.labels = None
    with torch.no_grad():
        embeds = vlm.language.get_input_embeddings()(batch.input_ids.clamp(min=0))
        embeds[0, (batch.input_ids[0] < 0)] = vlm.visual(batch)[0]
        vlm.language.set_attn_implementation("sdpa")
        by_hand = vlm.language(inputs_embeds=embeds).logits
        vlm.language.set_attn_implementation("vlbench_packed")
        assert torch.allclose(vlm(batch).logits, by_hand, atol=1e-5)


@pytest.mark.parametrize(("connector", "options"), [(LlavaMLP, {}), (Gated, {"gate": 0.5})])
def test_cached_generation_equals_recomputation(connector: type, options: dict) -> None:
    vlm = small_vlm(connector, options)
    asked = [make_sample(1), make_sample(2, images=2, words=30), make_sample(3, images=0)]
    asked = [replace(one, turns=one.turns[:1]) for one in asked]
    together = vlm.generate(vlm.processor.collate_prompts(asked), max_new_tokens=8)
    for one, expected in zip(asked, together, strict=True):
        batch = vlm.processor.collate_prompts([one])
        assert vlm.generate(batch, max_new_tokens=8) == [expected]
        for token in expected:  # no cache: the whole prompt again for every token
            logits = vlm(batch).logits[0, -1, : vlm.tokenizer.vocab_size]
            assert int(logits.argmax()) == token
            batch = extend_prompt(batch, token)


def test_a_resized_encoder_keeps_its_language_and_grows_its_places() -> None:
    vlm = small_vlm(LlavaMLP)
    before = vlm.connector.state_dict()
    vlm.set_image_size(56)
    assert vlm.connector.tokens_per_image == 16 == vlm.model.shapes.patches
    after = vlm.connector.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert vlm(make_batch(vlm, [[make_sample(1)]])).loss_sum.isfinite()


IMPOSSIBLE = [
    *({"max_new_tokens": value} for value in (1.5, None, 0, -1, True)),
    *({"seed": value} for value in (-1, 2**70, 0.5, None)),
    *({"temperature": value} for value in (1e-30, None, "hot", float("inf"))),
    *({"top_p": value} for value in (None, "all", 1.1)),
]


@pytest.mark.parametrize("options", IMPOSSIBLE, ids=str)
def test_what_cannot_be_generated_is_refused(options):
    vlm = small_vlm(LlavaMLP)
    with pytest.raises(UserError, match=f"^{next(iter(options))} is .*; allowed are ") as caught:
        vlm.chat([{"role": "user", "content": "x"}], **options)
    assert len(str(caught.value).splitlines()) == 1


def test_the_coldest_temperature_is_greedy():
    vlm = small_vlm(LlavaMLP)
    ask = [{"role": "user", "content": "x"}]
    greedy = vlm.chat(ask, max_new_tokens=4)
    assert vlm.chat(ask, max_new_tokens=4, temperature=1e-4) == greedy


def test_a_row_ends_where_the_positions_of_the_language_model_do():
    vlm = small_vlm(LlavaMLP)
    asked = [[{"role": "user", "content": text}] for text in ("x", "x " * 20)]
    batch = vlm.prepare(asked)
    short, long = (batch.sample_index >= 0).sum(1).tolist()
    vlm.language.config.max_position_embeddings = long + 3
    vlm.processor = replace(
        vlm.processor, template=replace(vlm.processor.template, stop="never said")
    )
    new = vlm.generate(batch, max_new_tokens=10_000)
    assert [len(row) for row in new] == [long + 3 - short, 3]


def test_chat_answers_one_conversation():
    vlm = small_vlm(LlavaMLP)
    ask = [{"role": "user", "content": "x"}]
    with pytest.raises(UserError, match="one conversation, given are 2"):
        vlm.chat([ask, ask])


def test_a_closed_image_is_named():
    vlm = small_vlm(LlavaMLP)
    image = Image.new("RGB", (8, 8))
    image.close()
    with pytest.raises(UserError, match="^image: "):
        vlm.prepare([{"role": "user", "content": [{"type": "image", "image": image}]}])


@pytest.mark.parametrize("options", [{"path": None}, {"dtype": torch.int8}, {"dtype": 3}], ids=str)
def test_what_cannot_be_loaded_is_one_line(options):
    with pytest.raises(UserError, match="(path|dtype|model) is ") as caught:
        vlbench.load(**{"path": CHECKPOINT, **options})
    assert len(str(caught.value).splitlines()) == 1
