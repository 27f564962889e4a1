"""BLIP-2's first stage: LAVIS' losses, gradients and masks from LAVIS' weights."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from random_vlm import make_batch, make_sample, small_vlm
from reference_records import assert_gradient, assert_outputs, load_record
from torch import Tensor

from vlbench.__main__ import main
from vlbench.connector import registry
from vlbench.connector.base import Shapes
from vlbench.model import blip2_objective
from vlbench.model.caption_tokens import CaptionTokenizer, load_caption_tokenizer

QFormer = registry.load_connector("qformer")
MODULE = sys.modules[QFormer.__module__]
SHAPES = Shapes(patches=8, grid=(2, 4), vision_width=24, lm_width=48, lm_layers=2)
SMALL = {"queries": 6, "width": 32, "layers": 4, "heads": 4, "ffn_width": 64}
CASE = "qformer_stage1"


@pytest.fixture
def recorded(monkeypatch):
    """Return the Q-Former with LAVIS' weights, ready for its first stage."""
    tokens = CaptionTokenizer(lambda text: [], 39, 37, 38, 0)
    monkeypatch.setattr(MODULE, "load_caption_tokenizer", lambda source, key: tokens)
    connector = QFormer(SHAPES, **SMALL, text="embedded", text_length=7, itc_width=20)
    connector.prepare_objective("blip2")
    connector.load_reference(load_record(CASE, "state_dict"))
    return connector


def losses(connector, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run the first stage on recorded inputs."""
    features = inputs["vision_features"]
    return connector.text(
        connector.qformer,
        connector.query_tokens,
        connector.ln_vision,
        features,
        (inputs["input_ids"], inputs["attention_mask"]),
        [f"pair {number}" for number in range(len(features))],
    )


def test_losses_and_gradients_equal_the_reference(recorded, monkeypatch):
    inputs = load_record(CASE, "inputs")
    drawn = {"image": inputs["neg_image_for_text"], "caption": inputs["neg_text_for_image"]}
    monkeypatch.setattr(
        blip2_objective, "draw_negatives", lambda _, __, seeds: drawn[seeds[0].split()[-1]]
    )
    inputs["vision_features"].requires_grad_()
    found = losses(recorded, inputs)
    pairs, words = len(inputs["input_ids"]), inputs["attention_mask"][:, 1:].sum()
    means = {"itc": found["itc"] / pairs, "itm": found["itm"] / (3 * pairs)}
    means["lm"] = found["itg"] / words
    expected = load_record(CASE, "outputs")
    for name, value in means.items():
        assert_outputs(value, expected[f"loss_{name}"])
    sum(means.values()).backward()
    grads = load_record(CASE, "grads")
    assert_gradient(inputs["vision_features"].grad, grads.pop("input.vision_features"), "features")
    parameters, compared = dict(recorded.named_parameters()), 0
    for name, grad in grads.items():
        key = MODULE.rename_reference_key(name.removeprefix("param."))
        tied = re.search(r"predictions\.decoder", key)
        # the bias of keys has no gradient in truth: softmax does not see it
        if not tied and not key.endswith("key.bias"):
            compared += 1
            if key == "text.embeddings.position_embeddings.weight":
                grad = grad[:7]
            assert_gradient(parameters[key].grad, grad, key)
    assert compared > 100


def test_negatives_are_drawn_as_likely_as_the_reference_says(recorded):
    outputs = load_record(CASE, "outputs")
    likeness = outputs["sim_t2i"].clone()  # already divided by the temperature
    seeds = [str(number) for number in range(len(likeness))]
    counts = torch.zeros_like(likeness)
    for turn in range(400):
        chosen = blip2_objective.draw_negatives(likeness, 0, [f"{seed} {turn}" for seed in seeds])
        counts[torch.arange(len(chosen)), chosen] += 1
    assert likeness.equal(outputs["sim_t2i"]) and not counts.diagonal().any()
    torch.testing.assert_close(counts / 400, outputs["weights_t2i"], atol=0.08, rtol=0)


def test_who_sees_whom_while_telling():
    masks = load_record("qformer_text", "masks")
    theirs = masks["itg_unilm_full"]
    text = masks["itc_text"][:, 0, 0]
    ours = blip2_objective.multimodal_causal_mask(
        theirs.shape[-1] - text.shape[-1], (text == 0).long()
    )
    allowed = theirs > -1 if theirs.is_floating_point() else theirs.bool()
    real = torch.cat([torch.ones(len(text), 6, dtype=torch.bool), text == 0], dim=1)
    for pair in range(len(ours)):  # rows of padding are read by nobody
        assert torch.equal(ours[pair, 0][real[pair]], allowed[pair, 0][real[pair]])


def first_stage_vlm(**options):
    """Return a small model in its first stage, its connector and encoder trained."""
    small = {"queries": 3, "width": 16, "layers": 2, "heads": 2, "ffn_width": 24, "itc_width": 8}
    vlm = small_vlm(QFormer, {**small, "text": "embedded", **options})
    vlm.model.set_objective("blip2")
    return vlm


def test_every_parameter_learns_and_the_projection_waits():
    vlm = first_stage_vlm()
    out = vlm(make_batch(vlm, [[make_sample(1), make_sample(2)], [make_sample(3)]]))
    assert out.loss_sum is None and set(out.extra) == {"itc", "itm", "itg"}
    sum(value for value, _ in out.extra.values()).backward()
    for name, parameter in vlm.connector.named_parameters():
        idle = name.startswith("projection.") or name.endswith("key.bias")
        assert parameter.grad is not None and (idle or parameter.grad.any()), name


def test_a_batch_without_images_gives_zero_and_gradients():
    vlm = first_stage_vlm()
    out = vlm(make_batch(vlm, [[make_sample(1, images=0)]]))
    loss = sum(value for value, _ in out.extra.values())
    loss.backward()
    assert loss.item() == 0 and [int(count) for _, count in out.extra.values()] == [0, 0, 0]
    assert all(p.grad is not None and not p.grad.any() for p in vlm.connector.parameters())


def test_a_single_pair_has_no_negatives_and_a_finite_loss():
    vlm = first_stage_vlm()
    out = vlm(make_batch(vlm, [[make_sample(1)]]))
    assert all(value.isfinite() for value, _ in out.extra.values())
    assert float(out.extra["itc"][0].detach()) == pytest.approx(0, abs=1e-6)


def test_the_text_side_comes_and_goes_with_its_stage():
    vlm = first_stage_vlm()
    added = {name for name in vlm.connector.state_dict() if MODULE.TEXT_KEYS.match(name)}
    vlm.set_image_size(56)  # the connector is built anew, still in its first stage
    assert added and added <= set(vlm.connector.state_dict())
    vlm.model.set_objective("language")
    assert not added & set(vlm.connector.state_dict())
    assert vlm(make_batch(vlm, [[make_sample(1)]])).loss_sum.isfinite()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Return a small BERT with random weights, in a folder as the hub gives it."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "star", "##s"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def test_a_bert_gives_tokens_and_first_weights(bert):
    from transformers import BertForMaskedLM

    tokens = load_caption_tokenizer(str(bert), "connector.text")
    ids, mask = tokens(["a red star", "red stars red stars"], 5)
    assert ids.tolist() == [[2, 5, 6, 7, 3], [2, 6, 7, 8, 3]] and mask.all()
    shapes = replace(SHAPES, vision_width=32)
    small = {"queries": 3, "width": 16, "layers": 2, "heads": 2, "ffn_width": 24, "itc_width": 8}
    connector = QFormer(shapes, **small, text=str(bert), text_length=8)
    connector.prepare_objective("blip2", fresh=True)
    ours, theirs = connector.state_dict(), BertForMaskedLM.from_pretrained(bert).state_dict()
    layer = "encoder.layer.1"
    for mine, its in (
        (
            f"qformer.{layer}.attention.attention.query.weight",
            f"{layer}.attention.self.query.weight",
        ),
        (f"qformer.{layer}.output.dense.weight", f"{layer}.output.dense.weight"),
        (f"qformer.{layer}.output_query.dense.weight", f"{layer}.output.dense.weight"),
        ("qformer.layernorm.weight", "embeddings.LayerNorm.weight"),
    ):
        assert ours[mine].equal(theirs[f"bert.{its}"]), mine
    embeddings = ours["text.embeddings.word_embeddings.weight"]
    assert embeddings[:9].equal(theirs["bert.embeddings.word_embeddings.weight"])
    assert len(embeddings) == 10  # the last one begins a caption
    assert ours["text.dense.weight"].equal(theirs["cls.predictions.transform.dense.weight"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["stages.blip2.sample_format=chat"],
            "stages.blip2.sample_format is 'chat'; objective blip2 learns from",
        ),
        (["stages.blip2.train.language.lr=1e-4"], "leaves the language model out"),
        (["connector.name=llava_mlp"], "stages.blip2.objective is 'blip2'; this connector offers"),
        (["stages.blip2.objective=blip"], "Did you mean 'blip2'"),
        (["connector.text=nowhere/bert"], "connector.text is 'nowhere/bert': no such folder of a"),
        (["connector.text_length=2"], "text_length is 2; it must be at least 3"),
    ],
)
def test_mistakes_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["fit", "recipe=yivl_blip2", "run=r", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "r").exists()


def test_the_first_stage_trains_stops_and_goes_on_as_if_it_had_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        "recipe=yivl_blip2",
        "stages.blip2.global_batch_size=6",
        "stages.blip2.steps=4",
        "log.every_n_steps=1",
    ]
    words += [f"stages.{name}.steps=1" for name in ("align_224", "align_448", "chat")]
    words += [f"stages.{name}.global_batch_size=2" for name in ("align_224", "align_448", "chat")]
    words += ["log.questions=2", "log.examples=0", "log.tensorboard=false"]
    assert main(["fit", *words, "run=whole"]) == 0
    assert main(["fit", *words, "run=parts"]) == 0
    first = checkpoints(tmp_path / "parts")[0]
    assert first.name == "0-blip2-000004"
    for later in checkpoints(tmp_path / "parts")[1:]:
        shutil.rmtree(later)
    (tmp_path / "parts" / "results.json").unlink()
    assert main(["fit", *words, "run=parts"]) == 0
    whole, parts = (
        checkpoints(tmp_path / name)[-1] / "model.safetensors" for name in ("whole", "parts")
    )
    assert whole.read_bytes() == parts.read_bytes()
    header = (tmp_path / "whole" / "metrics.csv").read_text().splitlines()[0]
    assert "held_out_itg" in header


def checkpoints(run):
    """Return the checkpoints of a run in the order of training."""
    return sorted(one for one in (run / "checkpoints").iterdir() if not one.name.startswith("."))
