"""Language models of other families: on packed rows, too, their numbers are transformers'."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_processes import run_in_processes
from golden_release import CHECKPOINT, edit_json
from language_folders import FAMILY_OPTIONS, write_language_folder
from published_configs import PUBLISHED_CONFIGS
from random_vlm import make_batch, make_sample
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from vlbench.connector import registry
from vlbench.contract_checks.small_model import build_small_vlm, extend_prompt, make_question
from vlbench.data.packing import PackedBatch
from vlbench.data.sample_encoding import IGNORE_INDEX
from vlbench.errors import UserError
from vlbench.model import language_loss, lora_adapters
from vlbench.model.decoder_families import DECODER_FAMILIES
from vlbench.model.fsdp_wrapping import apply_fsdp
from vlbench.model.language_model import (
    check_language_weights,
    load_language_model,
    read_language_config,
)
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.weights.hf_llava_layout import refuse_divided_logits
from vlbench.model.weights.tensor_groups import EMBEDDING_KEY

PLAIN = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "granite", "smollm3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("families")
    return {name: write_language_folder(name, parent / name) for name in FAMILY_OPTIONS}


def small_vlm(folder: Path, connector: str = "linear", **options: Any) -> LoadedVLM:
    """Return the small model with a language model from a folder."""
    language = load_language_model(folder, torch.float32)
    return build_small_vlm(registry.load_connector(connector), options, CHECKPOINT, language)


def theirs(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).eval()


def packed_batch(vlm: LoadedVLM) -> PackedBatch:
    """Return two rows of samples of different lengths, one without an image, one padded."""
    rows = [[make_sample(1), make_sample(2, images=2, words=9), make_sample(3, images=0)]]
    return make_batch(vlm, [*rows, [make_sample(4, words=30)]])


def sample_spans(batch: PackedBatch) -> list[tuple[int, slice]]:
    spans = []
    for row, lengths in enumerate(batch.sample_lengths):
        begin = 0
        for length in lengths:
            spans.append((row, slice(begin, begin + length)))
            begin += length
    return spans


@pytest.mark.parametrize("name", FAMILY_OPTIONS)
def test_packed_rows_have_the_numbers_of_transformers(name, folders):
    """Hidden states, logits, loss and gradients of every weight, sample by sample."""
    vlm, reference = small_vlm(folders[name]), theirs(folders[name])
    batch = packed_batch(vlm)
    visual = vlm.model.encode_images(batch)
    hidden = vlm.model.hidden_states(batch, visual)
    logits = vlm.model.logits(hidden)
    embeds = vlm.model.merge_embeddings(batch, visual)
    loss = torch.zeros(())
    for row, span in sample_spans(batch):
        inputs = embeds[row, span][None]
        out = reference(inputs_embeds=inputs, output_hidden_states=True)
        close(hidden[row, span], out.hidden_states[-1][0])
        close(logits[row, span], out.logits[0])
        labels = batch.labels[row, span]
        loss = loss + cross_entropy(
            out.logits[0], labels, reduction="sum", ignore_index=IGNORE_INDEX
        )
    ours = vlm.model(batch).loss_sum
    close(ours, loss)
    loss.backward()  # through the reference's layers into our embeddings and connector
    expected = {n: p.grad for n, p in reference.named_parameters()}
    before = {name: p.grad.clone() for name, p in vlm.connector.named_parameters()}
    inputs = vlm.model.token_embedding.weight.grad.clone()
    vlm.model.zero_grad()
    ours.backward()
    found = {n: p.grad for n, p in vlm.language.named_parameters()}
    is_tied = vlm.language.config.tie_word_embeddings
    own = expected.get(EMBEDDING_KEY) if is_tied else None
    expected[EMBEDDING_KEY] = inputs if own is None else inputs + own
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        close(found[key], gradient, key)
    for key, parameter in vlm.connector.named_parameters():
        close(parameter.grad, before[key], key)
        assert float(parameter.grad.abs().max()) > 0


def close(found: Tensor, expected: Tensor, name: str = "") -> None:
    """Compare relative to the largest number of a tensor."""
    scale = max(1.0, float(expected.detach().abs().max()))
    assert float((found - expected).detach().abs().max()) < 1e-5 * scale, name


def test_a_fused_loss_divides_the_logits_too(folders, monkeypatch):
    vlm = small_vlm(folders["granite"])
    batch = packed_batch(vlm)
    whole = vlm.model(batch).loss_sum
    whole.backward()
    expected = vlm.language.model.norm.weight.grad.clone()
    vlm.language.zero_grad()
    monkeypatch.setattr(language_loss, "MIN_FUSED_LOGITS", 1)
    fused = vlm.model(batch).loss_sum
    fused.backward()
    close(fused, whole)
    close(vlm.language.model.norm.weight.grad, expected)


@pytest.mark.parametrize("name", PLAIN)
def test_greedy_answers_are_those_of_transformers(name, folders):
    """Two prompts of different lengths in one batch, with a cache."""
    vlm, reference = small_vlm(folders[name]).eval(), theirs(folders[name])
    prompts = [make_question(5, images=0, words=3), make_question(6, images=0, words=8)]
    batch = vlm.processor.collate_prompts(prompts)
    ours = vlm.generate(batch, max_new_tokens=12)
    for prompt, new_ids in zip(prompts, ours, strict=True):
        ids = torch.tensor([vlm.processor.encode_prompt(prompt)])
        out = reference.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        expected = out[0, ids.shape[1] :].tolist()
        assert new_ids == expected[: len(new_ids)] and len(new_ids) >= 6
    assert ours[0] != ours[1]


@pytest.mark.parametrize("name", PLAIN)
def test_images_and_a_cache_give_what_recomputation_gives(name, folders):
    vlm = small_vlm(folders[name], "flamingo", every=2, latents=3, depth=1, heads=2, head_width=8)
    vlm.eval()
    question = make_question(7, images=2)
    batch = vlm.processor.collate_prompts([question])
    new_ids = vlm.generate(batch, max_new_tokens=4)[0]
    for count in range(len(new_ids)):
        with torch.no_grad():
            logits = vlm.model(batch).logits[0, -1]
        assert int(logits[: vlm.tokenizer.embedding_rows].argmax()) == new_ids[count]
        batch = extend_prompt(batch, new_ids[count])


@pytest.mark.parametrize("name", PLAIN)
def test_adapters_are_in_every_linear_layer_and_learn(name, folders):
    vlm = small_vlm(folders[name])
    vlm.language.requires_grad_(False)
    lora_adapters.add_adapters(
        vlm.language,
        "language",
        rank=2,
        alpha=None,
        dropout=0.0,
        targets="all-linear",
        rslora=False,
        dora=False,
        bits=None,
    )
    adapted = {
        path.removesuffix(".base_layer")
        for path, module in vlm.language.named_modules()
        if path.endswith(".base_layer") and isinstance(module, nn.Linear)
    }
    names = [f"self_attn.{n}_proj" for n in "qkvo"] + [
        f"mlp.{n}_proj" for n in ("gate", "up", "down")
    ]
    assert adapted == {f"model.layers.{i}.{n}" for i in range(3) for n in names}
    vlm.model(packed_batch(vlm)).loss_sum.backward()
    for path, parameter in lora_adapters.adapter_parameters(vlm.language).items():
        is_second = ".lora_B." in path  # the first one's gradient is zero while the second is
        assert parameter.grad is not None and (parameter.grad.abs().max() > 0) == is_second, path


def test_two_processes_share_a_model(folders):
    """FSDP2: the gradients of two processes are those of one."""

    def compare(rank: int) -> list[str]:
        lines = []
        for name in ("qwen3", "olmo2", "granite"):
            alone, together = small_vlm(folders[name]), small_vlm(folders[name])
            batch = packed_batch(alone)
            alone.model(batch).loss_sum.backward()
            mesh = distributed.device_mesh.init_device_mesh("cpu", (2,))
            apply_fsdp(together.model, mesh)(batch).loss_sum.backward()
            expected = {n: p.grad for n, p in alone.model.named_parameters() if p.grad is not None}
            for key, parameter in together.model.named_parameters():
                grad = parameter.grad
                grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
                if key in expected:
                    scale = max(1.0, float(expected[key].abs().max()))
                    if float((grad - expected[key]).abs().max()) > 1e-5 * scale:
                        lines.append(f"{name}: another gradient of {key}")
        return lines

    assert run_in_processes(compare) == [[], []]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a window in use": ("mistral", {"sliding_window": 128}, "sliding_window is 128 of 512"),
    "windows of upper layers": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 64,
            "max_window_layers": 2,
            "layer_types": None,
        },
        "sliding_window is 64 of 512",
    ),
    "experts": ("qwen3", {"model_type": "qwen3_moe", "num_experts": 8}, "mixture of experts"),
    "mixtral": ("mistral", {"model_type": "mixtral"}, "mixture of experts"),
    "encoder-decoder": ("llama", {"model_type": "t5"}, "an encoder-decoder"),
    "shared norms": ("llama", {"model_type": "cohere"}, "one norm for attention and MLP"),
    "remote code": (
        "llama",
        {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "m.Mine"}},
        "code in the folder",
    ),
    "remote code of a known type": (
        "llama",
        {"auto_map": {"AutoModelForCausalLM": "m.Mine"}},
        r"code in the folder \(m.Mine",
    ),
    "several parts": ("llama", {"model_type": "qwen2_vl", "vision_config": {}}, "several parts"),
    "unknown": ("llama", {"model_type": "lama"}, "not compared.*Did you mean 'llama'"),
    "no type": ("llama", {"model_type": None}, "model_type is None"),
    "long positions": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "factor": 2.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 64,
            }
        },
        "'longrope', which depend on the longest",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_missing_is_said_in_one_line(name, folders, tmp_path):
    base, changes, reason = REFUSED[name]
    said = json.loads((folders[base] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(said))
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(UserError, match=reason) as caught:
        read_language_config(tmp_path)
    assert len(caught.value.lines) == 1


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads is 3, which must divide"),
        ("smollm3", {"no_rope_layers": [0, 1]}, "built from its config.json.*IndexError"),
    ],
)
def test_values_that_do_not_go_together_are_said_in_one_line(
    name, changes, reason, folders, tmp_path
):
    shutil.copytree(folders[name], tmp_path / "copy")
    file = tmp_path / "copy/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=reason) as caught:
        check_language_weights(str(tmp_path / "copy"))
    assert len(caught.value.lines) == 1


@pytest.mark.parametrize("name", PUBLISHED_CONFIGS)
def test_published_configurations_are_read_as_transformers_reads_them(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_CONFIGS[name]))
    ours = read_language_config(tmp_path)
    reference = AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
    apart = {"sliding_window", "_name_or_path", "transformers_version"}
    expected = {k: v for k, v in reference.to_dict().items() if k not in apart}
    assert {k: v for k, v in ours.to_dict().items() if k not in apart} == expected
    assert ours.rope_parameters["rope_theta"] == PUBLISHED_CONFIGS[name]["rope_theta"]


def test_dropout_of_attention_is_left_out(folders, tmp_path):
    said = json.loads((folders["granite"] / "config.json").read_text()) | {"attention_dropout": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert read_language_config(tmp_path).attention_dropout == 0.0


def test_llavas_layout_does_not_hold_logits_that_are_divided(folders):
    config = read_language_config(folders["granite"])
    with pytest.raises(UserError, match="the language model has logits_scaling 6, by which"):
        refuse_divided_logits(config, "the language model")
    refuse_divided_logits(read_language_config(folders["qwen3"]), "the language model")


def test_every_family_was_compared_and_is_told_of():
    page = (Path(__file__).parents[1] / "docs/reference/language_models.md").read_text()
    told = set(re.findall(r"^\| `(\w+)` \|.*\|.*\|$", page.partition("## Chat templates")[0], re.M))
    assert told - {"model_type"} == set(DECODER_FAMILIES)
    assert {kind for kind, _ in FAMILY_OPTIONS.values()} == set(DECODER_FAMILIES) == set(PLAIN)
