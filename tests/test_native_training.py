"""Models of images in their own aspect ratios train alike packed, alone, resumed and cached."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from asked_conversations import recomputed
from native_models import SIZES, native_sample, native_vlm, write_native_encoder
from PIL import Image
from random_vlm import NoiseImage, make_batch, make_sample
from row_gradients import learn, two_process_differences
from safetensors.torch import load_file
from torch import Tensor

import vlbench
from vlbench.__main__ import main
from vlbench.data.filler_batches import empty_batch
from vlbench.data.sample import Sample
from vlbench.data.view_layout import NEWLINE_INDEX, ViewSettings
from vlbench.evaluate.place_features import have_equal_views
from vlbench.evaluate.view_map import WHOLE_IMAGE, find_map_box, map_image
from vlbench.model.generation.kv_cache import PrefixCache
from vlbench.model.generation.prefix_pool import position_keys
from vlbench.model.view_tokens import newline_of
from vlbench.text_files import read_csv
from vlbench.train import checkpoint_files

SAMPLES = [native_sample(1), native_sample(2, 2), make_sample(3, 0), native_sample(14)]
CONNECTORS = ["llava_mlp", "deepstack", pytest.param("dense", marks=pytest.mark.slow)]


@pytest.mark.parametrize("connector", CONNECTORS)
def test_packed_alone_and_in_another_order_learn_the_same(connector):
    loss, expected = learn(native_vlm(connector), [SAMPLES])
    assert (
        "connector.image_newline" in expected and "vision.visual.trunk.embeds.pos_embed" in expected
    )
    for rows in ([[one] for one in SAMPLES], [SAMPLES[::-1]], [SAMPLES[3:], SAMPLES[:3]]):
        found_loss, found = learn(native_vlm(connector), rows)
        assert found_loss == pytest.approx(loss, rel=1e-9) and found.keys() == expected.keys()
        for name, value in expected.items():
            away = float((found[name] - value).abs().max())
            near = 1e-5 if name.endswith("pos_embed") else 1e-9  # timm resizes it in float32
            assert away <= near * max(1e-3, float(value.abs().max())), name


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["sharded", "replicated"])
@pytest.mark.parametrize("connector", ["llava_mlp", "deepstack"])
def test_two_processes_have_the_gradients_of_one(wrap, connector):
    """Each has its own samples and shapes; one has text alone in its second micro-batch."""
    shares = [[SAMPLES[:2], [SAMPLES[2]]], [[SAMPLES[3]], [native_sample(5)]]]
    near = {"": 1e-8, "pos_embed": 1e-5}  # timm resizes position embeddings in float32
    found = two_process_differences(lambda: native_vlm(connector), shares, wrap, near)
    assert found == [[], []]


def test_an_image_takes_a_position_for_each_patch_and_a_newline_behind_each_row():
    vlm = native_vlm()
    batch = make_batch(vlm, [[native_sample(1), native_sample(2, 2)]])
    assert batch.patch_grids is not None and len(set(batch.patch_grids)) == 3
    index = batch.visual_index.tolist()
    for image, (rows, columns) in enumerate(batch.patch_grids):
        own, index = index[: rows * (columns + 1)], index[rows * (columns + 1) :]
        assert own[columns :: columns + 1] == [NEWLINE_INDEX] * rows
        numbers = [number for number in own if number >= 0]
        assert numbers == list(range(16 * image, 16 * image + rows * columns))
    assert not index
    with torch.no_grad():
        visual = vlm.visual(batch)
        embeds = vlm.model.merge_embeddings(batch, visual)[0][batch.find_image_positions()]
    assert embeds[0].equal(visual[0, 0]) and embeds[batch.patch_grids[0][1]].equal(
        newline_of(vlm.connector)
    )


def test_a_square_that_fills_the_budget_has_the_visual_tokens_of_the_plain_encoder():
    native, plain = native_vlm().eval(), native_vlm(native=False).eval()
    plain.connector.load_state_dict(
        {k: v for k, v in native.connector.state_dict().items() if k != "image_newline"}
    )
    sample = replace(make_sample(1), images=(NoiseImage(7, (48, 48)),))
    with torch.no_grad():
        found, wanted = (vlm.visual(make_batch(vlm, [[sample]])) for vlm in (native, plain))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_a_batch_without_images_gives_every_part_a_gradient():
    vlm = native_vlm()
    for batch in (make_batch(vlm, [[SAMPLES[2]]]), empty_batch()):
        vlm.model.zero_grad()
        vlm(batch).loss_sum.backward()
        missing = [n for n, p in vlm.model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing


def native_question(number: int) -> Sample:
    sample = native_sample(number, number % 3)
    return replace(sample, turns=sample.turns[:1])


@pytest.mark.parametrize("connector", CONNECTORS)
def test_answers_in_one_batch_and_with_a_cache_are_those_of_recomputation(connector):
    vlm = native_vlm(connector).to(torch.float64).eval()
    asked = [native_question(number) for number in (4, 5, 3)]
    answers = vlm.generate(vlm.processor.collate_prompts(asked), max_new_tokens=4)
    for one, found in zip(asked, answers, strict=True):
        prompt = vlm.processor.collate_prompts([one])
        assert recomputed(vlm, prompt, len(found)) == found
        past = PrefixCache()
        for _ in range(2):
            assert vlm.generate(prompt, 4, past=past) == [found]


def test_two_shapes_with_the_same_pixels_are_two_images():
    """A picture of one colour lies on the same sheet whether it is wide or tall."""
    vlm = native_vlm().eval()
    wide, tall = (
        vlm.prepare([{"role": "user", "content": [
            {"type": "image", "image": Image.new("RGB", size, (9, 9, 9))},
            {"type": "text", "text": "what?"},
        ]}]) for size in ((64, 32), (32, 64))
    )  # fmt: skip
    assert wide.patch_grids != tall.patch_grids and wide.pixels.equal(tall.pixels)
    count = min(wide.input_ids.shape[1], tall.input_ids.shape[1])
    assert not position_keys(wide)[:count].equal(position_keys(tall)[:count])
    past = PrefixCache()
    assert vlm.generate(wide, 3, past=past) == vlm.generate(wide, 3)
    assert vlm.generate(tall, 3, past=past) == vlm.generate(tall, 3)


def test_a_map_over_an_image_has_its_own_rows_and_columns():
    vlm = native_vlm()
    sample = native_sample(1)
    (image,) = vlm.processor.view_layout.tile_sample(sample).images
    (rows, columns), transform = image.grid, vlm.processor.transform
    values = torch.arange(16.0)[None]
    found = map_image(transform, image, values, vlm.vision.grid)
    assert found.tolist() == torch.arange(float(rows * columns)).view(rows, columns).tolist()
    assert find_map_box(transform, image) == WHOLE_IMAGE
    assert have_equal_views(vlm, [sample, sample])
    assert not have_equal_views(vlm, [native_sample(1), native_sample(2)])


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words of a short training on pictures of several shapes."""
    folder = tmp_path_factory.mktemp("native")
    encoder = write_native_encoder(folder / "encoder")
    random, records = np.random.default_rng(0), []
    for number in range(6):
        width, height = SIZES[number % len(SIZES)]
        pixels = random.integers(0, 255, (2 * height, 2 * width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        answer = {"from": "gpt", "value": f"It is {number}."}
        turns = [{"from": "human", "value": "<image>\nWhat?"}, answer]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return [
        "recipe=yivl_llava", "only=chat", "vision.aspect=native", f"vision.name={encoder}",
        "vision.weights=random", f"data.train={folder / 'data.json'}", f"data.images={folder}",
        "stages.chat.image_size=32", "stages.chat.steps=3", "stages.chat.global_batch_size=4",
    ]  # fmt: skip


FIT = (
    "log.every_n_steps=1", "log.questions=1", "log.examples=0", "log.tensorboard=false",
    "trainer.checkpoint_every=0.001", "trainer.keep_last_checkpoints=9",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run whose encoder learns."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["fit", *words, *FIT, f"run={folder}"]) == 0
    yield folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(checkpoint_files.find_checkpoint(folder) / "model.safetensors")


@pytest.mark.slow
def test_a_resumed_run_is_the_run_bit_for_bit(words, trained, tmp_path):
    folder = Path(shutil.copytree(trained, tmp_path / "cut"))
    (folder / "results.json").unlink()
    for later in sorted((folder / "checkpoints").iterdir())[1:]:
        shutil.rmtree(later)
    assert main(["fit", *words, *FIT, f"run={folder}"]) == 0
    again, whole = weights(folder), weights(trained)
    assert again.keys() == whole.keys()
    assert all(again[key].equal(whole[key]) for key in whole)


@pytest.mark.slow
def test_half_precision_begins_with_the_same_losses(words, trained, tmp_path):
    assert main(["fit", *words, *FIT, "precision=bf16", f"run={tmp_path / 'half'}"]) == 0
    half, whole = (
        [float(row["loss"]) for row in read_csv(folder / "metrics.csv")]
        for folder in (tmp_path / "half", trained)
    )
    assert half == pytest.approx(whole, rel=0.02) and half != whole


@pytest.mark.slow
def test_a_checkpoint_keeps_aspects_as_its_training_did(trained, tmp_path, capsys):
    vlm = vlbench.load(trained)
    assert vlm.processor.view_settings == ViewSettings(None) and vlm.processor.transform.native
    assert vlm.vision.takes_any_grid
    content = [
        {"type": "image", "image": Image.effect_noise((150, 60), 80)},
        {"type": "text", "text": "what?"},
    ]
    batch = vlm.prepare([{"role": "user", "content": content}])
    assert batch.patch_grids == [(2, 5)]
    assert isinstance(vlm.chat([{"role": "user", "content": content}], max_new_tokens=3), str)
    command = ["export", f"model={trained}", f"out={tmp_path / 'out'}"]
    assert main([*command, "format=hf_llava_next"]) == 2
    assert "in their own aspect ratios" in capsys.readouterr().err
    assert main([*command, "format=vlbench"]) == 0
    assert vlbench.load(tmp_path / "out").processor.transform.native


@pytest.mark.slow
def test_kept_features_train_as_those_that_are_computed(words, tmp_path):
    frozen = [*words, *FIT, "stages.chat.train.vision=null"]
    assert main(["fit", *frozen, f"run={tmp_path / 'plain'}"]) == 0
    cache = f"trainer.feature_cache={tmp_path / 'cache'}"
    assert main(["fit", *frozen, cache, f"run={tmp_path / 'kept'}"]) == 0
    kept, plain = weights(tmp_path / "kept"), weights(tmp_path / "plain")
    assert all(kept[key].equal(plain[key]) for key in plain)


@pytest.mark.slow
def test_check_and_plan_count_the_positions_of_each_image(words, tmp_path, capsys):
    assert main(["check", *words, f"out={tmp_path / 'check'}"]) == 0
    assert "views of an image: 1 on average" in capsys.readouterr().out
    assert main(["plan", *words]) == 0
    said = capsys.readouterr().out
    positions = [2 * 7, 4 * 5, 6 * 3, 5 * 4, 2 * 7, 4 * 5]
    assert f"image positions of a sample: 1, 1, {sum(positions) / 6:.4g}" in said


@pytest.mark.slow
def test_an_encoder_of_squares_is_refused_in_one_line(capsys, tmp_path):
    words = ["recipe=yivl_llava", "vision.aspect=native", f"run={tmp_path / 'run'}"]
    assert main(["fit", *words]) == 2
    said = capsys.readouterr().err.strip()
    assert "takes squares alone" in said and "naflexvit" in said and "\n" not in said
