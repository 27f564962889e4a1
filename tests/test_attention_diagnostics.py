"""Diagnostics of a trained run: relevance, attention, gauges. tests/test_contract.py has more."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_vlm import SMALL, make_batch, make_sample, open_gates, small_vlm
from torch import Tensor, nn

from vlbench.__main__ import main
from vlbench.connector import registry
from vlbench.connector.base import Connector, attention_shares
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample
from vlbench.errors import UserError
from vlbench.evaluate.attention_diagnostics import diagnose_answers, measure_relevance
from vlbench.evaluate.heldout_questions import EvalQuestion
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.lora_adapters import adapter_parameters, add_adapters
from vlbench.model.vlm import VLM
from vlbench.train.progress_logging import METRIC_COLUMNS, connector_metrics


class Keyhole(Connector):
    """It sees the last patch alone, and writes into what it is given."""

    tokens_per_image = 2

    def __init__(self, shapes) -> None:
        super().__init__()
        self.proj = nn.Linear(shapes.vision_width, 2 * shapes.lm_width)

    def forward(self, features: Tensor) -> Tensor:
        features *= 2
        return self.proj(features[:, -1]).unflatten(-1, (2, -1))


class Blind(Keyhole):
    """Its tokens are always the same."""

    def forward(self, features: Tensor) -> Tensor:
        return self.proj.weight.unflatten(0, (2, -1)).mean(-1).expand(len(features), -1, -1)


class Askew(Keyhole):
    """Its attention has the wrong shape."""

    def patch_attention(self, features: Tensor) -> Tensor:
        return features.new_ones(len(features), 2, 3)


def build_small_vlm(name: str) -> LoadedVLM:
    return open_gates(small_vlm(registry.load_connector(name), SMALL.get(name)))


def question(number: int, images: int = 1) -> EvalQuestion:
    one = make_sample(number, images)
    return EvalQuestion(replace(one, turns=one.turns[:1]), "two", "count", "en")


def test_a_connector_that_sees_one_patch_has_all_relevance_there():
    told = diagnose_answers(
        small_vlm(Keyhole), [(question(1), "one"), (question(2, images=2), "two")]
    )
    assert [one["relevance"] for one in told["maps"]] == [[[0, 0], [0, 1]]] * 2
    assert [one["id"] for one in told["maps"]] == ["s1", "s2"]
    first = told["maps"][0]
    assert (first["answer"], first["truth"]) == ("one", "two")
    assert IMAGE_PLACEHOLDER not in first["question"] and first["question"].startswith("question 1")
    assert sum(told["tokens"]) == pytest.approx(1, abs=1e-4) and told["attention"] is None
    assert told["effective"] == pytest.approx(
        math.exp(-sum(share * math.log(share) for share in told["tokens"])), abs=1e-3
    )


def test_relevance_is_gradient_times_feature_of_the_answer():
    """Against differences: features are nudged, the log-probability of answers is measured."""
    vlm = build_small_vlm("llava_mlp").to(torch.float64).eval()
    told = [*question(1).sample.turns, ChatTurn("assistant", "one"), *make_sample(1).turns[2:]]
    batch = make_batch(vlm, [[Sample("s", tuple(told), make_sample(1).images)]])
    batch = batch.to("cpu", torch.float64)
    features = vlm.features(batch).detach()

    def log_probability(values: Tensor) -> Tensor:
        logits = vlm.language.lm_head(vlm.model.hidden_states(batch, vlm.connector(values)))[0]
        told = batch.labels[0] >= 0
        return logits.log_softmax(-1)[told, batch.labels[0][told]].sum()

    with torch.no_grad():
        slopes = torch.zeros_like(features)
        for place in range(features.numel()):
            step = torch.zeros_like(features)
            step.view(-1)[place] = 5e-2
            up, down = (log_probability(features + sign * step) for sign in (1, -1))
            slopes.view(-1)[place] = up - down
    sizes = (slopes * features)[0].norm(dim=-1)
    torch.testing.assert_close(
        measure_relevance(vlm.model, batch).patch_relevance[0],
        sizes / sizes.sum(),
        atol=1e-3,
        rtol=0,
    )


def test_an_earlier_answer_belongs_to_the_question(monkeypatch):
    vlm, seen = build_small_vlm("linear"), []
    loss = VLM.language_loss
    monkeypatch.setattr(VLM, "language_loss", lambda *given: seen.append(given[2]) or loss(*given))
    one = make_sample(1)
    asked = EvalQuestion(replace(one, turns=one.turns[:3]), "no", "", "en")
    diagnose_answers(vlm, [(asked, "no 5")])
    labels = seen[0][seen[0] >= 0].tolist()
    assert vlm.tokenizer.decode(labels).strip() == "no 5\n###"


@pytest.mark.parametrize("name", ["llava_mlp", "flamingo"])
def test_adapters_and_recomputing_are_looked_through(name):
    vlm = build_small_vlm(name)
    before = diagnose_answers(vlm, [(question(1), "one")])
    vlm.language.requires_grad_(False)
    options = {"alpha": None, "dropout": 0.5, "targets": "all-linear", "bits": None}
    add_adapters(vlm.language, "language", rank=2, rslora=False, dora=False, **options)
    assert diagnose_answers(vlm, [(question(1), "one")]) == before  # they begin with nothing
    torch.manual_seed(1)
    for parameter in adapter_parameters(vlm.language).values():
        parameter.data.normal_(std=0.1)
    after = diagnose_answers(vlm, [(question(1), "one")])
    assert after != before
    vlm.model.enable_activation_checkpointing("full")
    assert diagnose_answers(vlm, [(question(1), "one")]) == after
    assert all(parameter.grad is None for parameter in vlm.parameters())


@pytest.mark.parametrize("gate", [0.0, 0.5])
def test_behind_closed_gates_nothing_is_relevant(gate):
    vlm = build_small_vlm("flamingo")
    for block in vlm.connector.blocks.values():
        block.attn_gate.data.fill_(gate)
    told = diagnose_answers(vlm, [(question(1), "one")])
    found = (told["maps"][0]["relevance"], told["tokens"], told["effective"])
    assert all((one is None) == (gate == 0) for one in found)
    assert told["attention"]["maps"][0] is not None


def test_a_blind_connector_has_tokens_but_no_patches():
    told = diagnose_answers(small_vlm(Blind), [(question(1), "one")])
    assert told["maps"][0]["relevance"] is None and len(told["tokens"]) == 2


def test_a_question_without_an_image_is_left_out():
    vlm = build_small_vlm("linear")
    assert diagnose_answers(vlm, [(question(1, images=0), "one")]) == {}
    told = diagnose_answers(vlm, [(question(1, images=0), "one"), (question(2), "")])
    assert [one["id"] for one in told["maps"]] == ["s2"]


def test_attention_of_the_wrong_shape_is_named():
    with pytest.raises(
        UserError, match=r"Askew: patch_attention gives \[1, 2, 3\]; needed are \[1, 2, 4"
    ):
        diagnose_answers(small_vlm(Askew), [(question(1), "one")])


def test_looking_evenly_has_the_entropy_of_all_patches():
    vlm = build_small_vlm("resampler")
    vlm.connector.to_q.weight.data.zero_()
    vlm.connector.to_q.bias.data.zero_()
    attention = diagnose_answers(vlm, [(question(1), "one")])["attention"]
    assert attention["entropy"] == attention["uniform"] == pytest.approx(math.log(4), abs=1e-4)
    assert torch.tensor(attention["maps"]).allclose(torch.tensor(0.25))


@pytest.mark.parametrize("tokens", ["qformer", "mixed"])
def test_attention_of_the_qformer_is_what_transformers_tells(tokens):
    options = {**SMALL["qformer"], "layers": 4}
    if tokens == "mixed":
        words = tuple(f"{key}={value}" for key, value in options.items())
        options = {**SMALL["mixed"], "tokens": "qformer", "options": words}
    vlm = small_vlm(registry.load_connector(tokens), options)
    features = vlm.features(make_batch(vlm, [[make_sample(1, images=2)]])).detach()
    qformer = vlm.connector if tokens == "qformer" else vlm.connector.inner
    for parameter in qformer.parameters():
        parameter.data.normal_()  # attention that begins random is nearly even
    shares = vlm.connector.patch_attention(features)
    qformer.qformer.set_attn_implementation("eager")
    told = qformer.qformer(
        query_embeds=qformer.query_tokens.expand(2, -1, -1),
        encoder_hidden_states=qformer.ln_vision(features),
        output_attentions=True,
    ).cross_attentions
    assert len(told) == 2
    expected = torch.stack(told).mean((0, 2))[..., 1:]
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(shares, expected)
    assert expected.std() > 0.05


def test_attention_of_flamingo_is_that_of_its_layers():
    vlm = small_vlm(registry.load_connector("flamingo"), {**SMALL["flamingo"], "depth": 2})
    perceiver = vlm.connector.perceiver
    features = vlm.features(make_batch(vlm, [[make_sample(1, images=2)]])).detach()
    latents, seen = perceiver.latents.expand(2, -1, -1), []
    for attend, feed in perceiver.layers:
        own = attend.norm_latents(latents)
        keys = attend.to_kv(torch.cat([attend.norm_media(features), own], dim=1)).chunk(2, -1)[0]
        heads = zip(attend.to_q(own).chunk(2, -1), keys.chunk(2, -1), strict=True)
        seen += [(q @ k.transpose(1, 2) / math.sqrt(8)).softmax(-1) for q, k in heads]
        latents = latents + attend(features, latents)
        latents = latents + feed(latents)
    expected = sum(seen)[..., :4]
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(vlm.connector.patch_attention(features), expected)


def test_watching_attention_leaves_no_hook_behind():
    layer = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError):
        attention_shares([(layer, layer)], 1, lambda: 1 // 0)
    assert not layer._forward_hooks


def test_gauges_begin_closed_and_tell_the_layer():
    vlm = small_vlm(registry.load_connector("flamingo"), SMALL["flamingo"])
    names = {f"gate_{kind}_{layer}" for kind in ("attn", "ff") for layer in range(3)}
    assert vlm.connector.metrics() == dict.fromkeys(names, 0.0)
    vlm.connector.blocks["1"].ff_gate.data.fill_(0.5)
    assert vlm.connector.metrics()["gate_ff_1"] == pytest.approx(math.tanh(0.5))
    mixed = build_small_vlm("mixed").connector
    assert mixed.metrics() == pytest.approx(dict.fromkeys(names, math.tanh(0.5)))


def test_a_gauge_with_the_name_of_a_column_is_refused():
    class Loud(Keyhole):
        def metrics(self) -> dict[str, float]:
            return {"loss": 1.0}

    with pytest.raises(UserError, match="Loud: a gauge is called 'loss'"):
        connector_metrics(small_vlm(Loud).connector, METRIC_COLUMNS)


def test_a_run_holds_gauges_and_diagnostics(tmp_path: Path) -> None:
    words = ["fit", "recipe=yivl_flamingo", "only=chat", "stages.chat.steps=2"]
    words += [
        "stages.chat.global_batch_size=4",
        "log.questions=10",
        "log.every_n_steps=1",
        "log.tensorboard=false",
    ]
    assert main([*words, f"run={tmp_path / 'run'}"]) == 0
    with (tmp_path / "run/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    gates = [name for name in rows[0] if name.startswith("gate_attn_")]
    assert len(rows) == 2 and gates and all(float(rows[-1][name]) for name in gates)
    text = (tmp_path / "run/diagnostics.json").read_text(encoding="utf-8")
    told = json.loads(text)
    assert "NaN" not in text and len(told["maps"]) == len(told["attention"]["maps"]) == 8
    rows_, columns = told["maps"][0]["grid"]
    for one in told["maps"]:
        assert [len(row) for row in one["relevance"]] == [columns] * rows_
        assert sum(map(sum, one["relevance"])) == pytest.approx(1, abs=1e-3)
    lines = (tmp_path / "run/answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [one for one in map(json.loads, lines) if one["set"] == "accuracy"]
    given = {(one["id"], one["truth"]): one["answer"] for one in answers}
    assert all(given[one["id"], one["truth"]] == one["answer"] for one in told["maps"])
