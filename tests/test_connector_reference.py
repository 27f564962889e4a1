"""Weights of a reference implementation: each tensor is the file's, and nothing goes unsaid."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
)

from vlbench.__main__ import main
from vlbench.connector import registry
from vlbench.connector.base import Connector, Shapes
from vlbench.errors import UserError
from vlbench.model.weights.connector_reference import ReferenceWeights, load_reference_weights
from vlbench.model.weights.tensor_files import read_tensor_shapes, weight_files

SHAPES = Shapes(patches=16, grid=(4, 4), vision_width=24, lm_width=32, lm_layers=4)
QFORMER = {"queries": 6, "width": 32, "layers": 2, "heads": 4, "ffn_width": 48}
FLAMINGO = {"every": 2, "depth": 1, "latents": 4, "heads": 2, "head_width": 8}
LLAVA = {"depth": 2, "norm": False}
State = dict[str, Tensor]


def built(name: str, options: dict[str, Any], seed: int = 0) -> Connector:
    torch.manual_seed(seed)
    return registry.load_connector(name)(SHAPES, **options)


def random(state: State) -> State:
    noise = torch.Generator().manual_seed(11)
    return {name: torch.randn(tensor.shape, generator=noise) for name, tensor in state.items()}


def projector(state: State) -> tuple[State, State]:
    """Return LLaVA's names, and what else such a file holds."""
    own = {k.replace("layers.", "model.mm_projector."): v for k, v in state.items()}
    return own, {"model.embed_tokens.weight": torch.ones(2, 3)}


def linear(state: State) -> tuple[State, State]:
    """Return the names of LLaVA v1, whose one layer has no number."""
    own, rest = projector(state)
    return {name.replace("mm_projector.0.", "mm_projector."): v for name, v in own.items()}, rest


def openflamingo(state: State) -> tuple[State, State]:
    own = {}
    for name, tensor in state.items():
        start = r"lang_encoder.model.layers.\1.gated_cross_attn_layer."
        own[re.sub(r"^blocks\.(\d+)\.", start, name)] = tensor
    del own["image_embedding"]
    return own, {"lang_encoder.model.embed_tokens.weight": torch.ones(2, 3)}


TO_LAVIS = (
    (r"^qformer\.layernorm\.", "Qformer.bert.embeddings.LayerNorm."),
    (r"^(qformer\.encoder\.layer\.\d+\.\w+)\.attention\.", r"\1.self."),
    (r"^qformer\.", "Qformer.bert."),
    (r"^projection\.", "opt_proj."),
)


def lavis(state: State) -> tuple[State, State]:
    own = {}
    for name, tensor in state.items():
        for pattern, replacement in TO_LAVIS:
            name = re.sub(pattern, replacement, name)
        own[name] = tensor
    rest = ("visual_encoder.blocks.0.norm1.weight", "opt_model.model.decoder.x.weight")
    rest += ("Qformer.bert.embeddings.position_ids", "Qformer.cls.predictions.bias", "temp")
    return own, {name: torch.ones(2) for name in rest}


def cogvlm(state: State) -> tuple[State, State]:
    own = {n if n in ("boi", "eoi") else f"linear_proj.{n}": v for n, v in state.items()}
    return own, {"vit.transformer.x": torch.ones(2)}


CASES: dict[str, tuple[str, dict[str, Any], Callable[[State], tuple[State, State]]]] = {
    "LLaVA": ("llava_mlp", LLAVA, projector),
    "Yi-VL": ("llava_mlp", {}, projector),
    "LLaVA v1": ("linear", {}, linear),
    "OpenFlamingo": ("flamingo", FLAMINGO, openflamingo),
    "LAVIS": ("qformer", QFORMER, lavis),
    "CogVLM": ("glu", {}, cogvlm),
}


def wrapped(start: str) -> Callable[[State, Path], Path]:
    def write(state: State, folder: Path) -> Path:
        inner = {start + name: tensor for name, tensor in state.items()}
        torch.save({"epoch": 3, "model_state_dict": inner}, folder / "x.pt")
        return folder / "x.pt"

    return write


def as_bin(state: State, folder: Path) -> Path:
    torch.save(state, folder / "x.bin")
    return folder / "x.bin"


def as_safetensors(state: State, folder: Path) -> Path:
    save_file(state, folder / "x.safetensors")
    return folder / "x.safetensors"


FORMS = {
    "bin": as_bin,
    "safetensors": as_safetensors,
    "a trainer's": wrapped("module."),
    "LoRA training's": wrapped("base_model.model."),
}


@pytest.mark.parametrize("write", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("name", "options", "named"), CASES.values(), ids=CASES)
def test_every_tensor_is_the_files(name, options, named, write, tmp_path):
    connector = built(name, options)
    before = {key: tensor.clone() for key, tensor in connector.state_dict().items()}
    expected = random(before)
    own, rest = named(expected)
    file = write(own | rest, tmp_path)
    said = load_reference_weights(connector, ReferenceWeights([file]), name, "init")
    for key, tensor in connector.state_dict().items():
        kept = key == "image_embedding"  # where the embedding of <image> is, no file tells
        assert torch.equal(tensor, before[key] if kept else expected[key]), key
    assert said.startswith(f"{len(own)} tensors") and "left out: " in said
    assert ("as it began: image_embedding" in said) == ("image_embedding" in before)
    assert said.endswith("which are not in it") == ("base_model" in min(read_tensor_shapes(file)))
    empty = built(name, options).to("meta")
    assert (
        load_reference_weights(empty, ReferenceWeights([file], on_meta=True), name, "init") == said
    )


def half(state: State) -> None:
    for key in list(state)[: len(state) // 2]:
        del state[key]


def misshape(state: State) -> None:
    key = next(key for key in state if state[key].dim() == 2)
    state[key] = state[key][:, 1:].contiguous()


SPOILED: dict[str, Callable[[State], object]] = {
    "a missing half": half,
    "an extra tensor": lambda state: state.update(extra=torch.ones(2)),
    "one more of its own": lambda state: state.update(
        {f"{key}.x": state[key].clone() for key in list(state)[-1:]}
    ),
    "another shape": misshape,
    "nothing": lambda state: state.clear(),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
@pytest.mark.parametrize(("name", "options", "named"), CASES.values(), ids=CASES)
def test_what_does_not_fit_is_one_line(name, options, named, spoil, tmp_path):
    own, rest = named(random(built(name, options).state_dict()))
    spoil(own)
    if name == "glu" and "extra" in own:
        pytest.skip("a state of CogVLM holds everything")
    file = as_safetensors(own | (rest if own else {}), tmp_path)
    for connector, empty in (
        (built(name, options), False),
        (built(name, options).to("meta"), True),
    ):
        with pytest.raises(UserError) as caught:
            load_reference_weights(connector, ReferenceWeights([file], empty), name, "init=x")
        assert str(caught.value).startswith("init=x") and "\n" not in str(caught.value)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def legacy(file: Path) -> None:
    torch.save({"a": torch.ones(9)}, file, _use_new_zipfile_serialization=False)
    cut(file)


TORN = {
    "cut": cut,
    "17 bytes": lambda file: file.write_text("hello world 12345"),
    "empty": lambda file: file.write_bytes(b""),
    "no zip": lambda file: file.write_bytes(b"PK\3\4" + bytes(40) + b"PK\5\6" + b"\1" * 18),
    "an old pickle, cut": legacy,
}


@pytest.mark.parametrize("tear", TORN.values(), ids=TORN)
@pytest.mark.parametrize("write", [as_bin, as_safetensors])
def test_a_torn_file_is_one_line_before_there_is_a_run(write, tear, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = write(projector(random(built("llava_mlp", LLAVA).state_dict()))[0], tmp_path)
    tear(file)
    words = ["fit", "recipe=yivl_llava", "only=chat", f"init={file}", "run=run"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and file.name in said
    assert not Path("run").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_may_be_cut_anywhere(zipped, tmp_path):
    file = tmp_path / "x.bin"
    torch.save({"a": torch.ones(9)}, file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError) as caught:
            ReferenceWeights([file])
        assert "\n" not in str(caught.value) and "x.bin" in str(caught.value)


NAMED = {
    "no norms": (
        "llava_mlp",
        {},
        LLAVA,
        "without LayerNorms: say connector.depth=2 connector.norm=false",
    ),
    "norms": ("llava_mlp", LLAVA, {}, "with LayerNorms: say connector.depth=2 connector.norm=true"),
    "deeper": ("llava_mlp", LLAVA, {"depth": 3, "norm": False}, "connector.depth=3"),
    "narrower": (
        "llava_mlp",
        LLAVA,
        {**LLAVA, "mlp_ratio": 0.5},
        "connector.norm=false connector.mlp_ratio=0.5",
    ),
    "one layer": ("llava_mlp", {}, {"depth": 1, "norm": False}, "connector.depth=1 connector.norm"),
    "an MLP": (
        "linear",
        {},
        LLAVA,
        "say connector.name=llava_mlp connector.depth=2 connector.norm",
    ),
}


@pytest.mark.parametrize(("name", "options", "theirs", "words"), NAMED.values(), ids=NAMED)
def test_a_projector_of_another_form_says_which_options_it_needs(
    name, options, theirs, words, tmp_path
):
    file = as_bin(projector(built("llava_mlp", theirs).state_dict())[0], tmp_path)
    with pytest.raises(UserError, match=words):
        load_reference_weights(built(name, options), ReferenceWeights([file]), name, "init=x")


def test_names_of_projectors_that_people_have(tmp_path):
    expected = random(built("llava_mlp", LLAVA).state_dict())
    bare = {key.removeprefix("layers."): tensor for key, tensor in expected.items()}
    inside = {k.replace("0.", "linear_1.").replace("2.", "linear_2."): v for k, v in bare.items()}
    whole = {"language_model.lm_head.weight": torch.ones(2), "vision_tower.x": torch.ones(2)}
    for number, state in enumerate(
        (
            bare,
            {f"mm_projector.{key}": tensor for key, tensor in bare.items()},
            {f"module.model.mm_projector.{key}": tensor for key, tensor in bare.items()},
            {f"base_model.model.model.mm_projector.{k}": tensor for k, tensor in bare.items()},
            {f"_connector.{key}": tensor for key, tensor in bare.items()},
            {f"multi_modal_projector.{key}": tensor for key, tensor in inside.items()} | whole,
            {f"model.multi_modal_projector.{key}": tensor for key, tensor in inside.items()},
        )
    ):
        (tmp_path / str(number)).mkdir()
        file = as_bin(state, tmp_path / str(number))
        connector = built("llava_mlp", LLAVA)
        load_reference_weights(connector, ReferenceWeights([file]), "llava_mlp", "init")
        assert all(torch.equal(t, expected[k]) for k, t in connector.state_dict().items()), number


def test_adapters_are_no_connector(tmp_path):
    start = "base_model.model.model.layers.0.self_attn.q_proj"
    state = {f"{start}.lora_{letter}.weight": torch.ones(2, 2) for letter in "AB"}
    for write in (as_bin, as_safetensors):
        with pytest.raises(UserError, match="holds LoRA adapters.*non_lora_trainables.bin"):
            ReferenceWeights([write(state, tmp_path)])


def test_a_folder_of_adapters_says_what_to_give(tmp_path, capsys):
    state = {"base_model.model.model.layers.0.q_proj.lora_A.weight": torch.ones(2, 2)}
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    for config in (None, '{"mm_vision_tower": "openai/clip", "model_type": "llava"}'):
        if config:
            (tmp_path / "config.json").write_text(config)
        assert main(["fit", "recipe=yivl_llava", f"init={tmp_path}", "run=unused"]) == 2
        said = capsys.readouterr().err
        assert "LoRA adapters" in said and len(said.splitlines()) == 1


def test_a_connector_that_does_not_say_what_it_loaded_is_refused(tmp_path):
    class Silent(registry.load_connector("linear")):  # type: ignore[misc]
        def load_reference(self, weights):
            super().load_reference(weights)

    file = as_bin(linear(random(built("linear", {}).state_dict()))[0], tmp_path)
    with pytest.raises(UserError, match="load_reference returned None"):
        load_reference_weights(Silent(SHAPES), ReferenceWeights([file]), "silent", "init")


@pytest.fixture(scope="module")
def blip2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that transformers wrote, in several shards."""
    config = Blip2Config(
        vision_config={"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        qformer_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"intermediate_size": 48, "encoder_hidden_size": 24, "vocab_size": 60},
        text_config={"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "ffn_dim": 32, "vocab_size": 60, "word_embed_proj_dim": 32},
        num_query_tokens=6,
    )
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("blip2")
    Blip2ForConditionalGeneration(config).save_pretrained(folder, max_shard_size="40KB")
    return folder


def test_every_tensor_of_a_blip2_of_transformers_is_its_files(blip2):
    files = weight_files(blip2)
    assert len(files) > 1
    connector = built("qformer", QFORMER)
    said = load_reference_weights(connector, ReferenceWeights(files), "qformer", "init")
    theirs = Blip2ForConditionalGeneration.from_pretrained(blip2).state_dict()
    own = connector.state_dict()
    pairs = {name: f"model.{name}" if f"model.{name}" in theirs else name for name in own}
    compared = 0
    for name, tensor in own.items():
        other = pairs[name].replace("projection.", "language_projection.")
        other = other.replace("ln_vision.", "vision_model.post_layernorm.")
        found = [theirs[key] for key in theirs if key.removeprefix("model.") == other]
        assert len(found) == 1 and torch.equal(tensor, found[0]), name
        compared += 1
    assert said.startswith(f"{compared} tensors; left out: ") and "language_model (" in said


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]


def bert(folder: Path, kind: type = BertForPreTraining, **changes: int) -> Path:
    """Write a small BERT with random weights, as transformers writes google-bert's."""
    folder.mkdir(exist_ok=True)
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"intermediate_size": 48, "vocab_size": len(WORDS), "max_position_embeddings": 64}
    torch.manual_seed(4)
    kind(BertConfig(**{**config, **changes})).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return folder


@pytest.mark.parametrize("kind", [BertForPreTraining, BertModel], ids=["with a head", "bare"])
def test_every_tensor_of_a_bert_is_its_files(kind, tmp_path, capsys):
    folder = bert(tmp_path / "bert", kind)
    connector = built("qformer", {**QFORMER, "text": str(folder)})
    connector.prepare_objective("blip2", fresh=True)
    said = capsys.readouterr().out
    theirs = {
        k.removeprefix("bert."): v for k, v in kind.from_pretrained(folder).state_dict().items()
    }
    own = connector.state_dict()
    layers = {
        "intermediate": "intermediate.dense",
        "intermediate_query": "intermediate.dense",
        "output": "output.dense",
        "output_query": "output.dense",
    }
    for layer in range(2):
        for ours, other in layers.items():
            start = f"encoder.layer.{layer}"
            for end in ("weight", "bias"):
                found = own[f"qformer.{start}.{ours}.dense.{end}"]
                assert torch.equal(found, theirs[f"{start}.{other}.{end}"]), (layer, ours)
        for part in ("query", "key", "value"):
            found = own[f"qformer.encoder.layer.{layer}.attention.attention.{part}.weight"]
            assert torch.equal(found, theirs[f"encoder.layer.{layer}.attention.self.{part}.weight"])
    assert torch.equal(own["qformer.layernorm.bias"], theirs["embeddings.LayerNorm.bias"])
    words = theirs["embeddings.word_embeddings.weight"]
    assert torch.equal(own["text.embeddings.word_embeddings.weight"][:-1], words)
    positions = theirs["embeddings.position_embeddings.weight"]
    assert torch.equal(own["text.embeddings.position_embeddings.weight"], positions[:32])
    assert "pooler (" in said or "bert (" in said
    assert ("as it began: text.bias" in said) == (kind is BertModel)
    if kind is BertForPreTraining:
        other = theirs["cls.predictions.transform.dense.weight"]
        assert torch.equal(own["text.dense.weight"], other)


def forget(key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        state = {k: v for f in weight_files(folder) for k, v in ReferenceWeights([f]).items()}
        save_file({k: v for k, v in state.items() if key not in k}, folder / "model.safetensors")

    return change


def add(folder: Path) -> None:
    state = dict(ReferenceWeights(weight_files(folder))) | {"extra": torch.ones(2)}
    save_file(state, folder / "model.safetensors")


ODD_BERTS: dict[str, tuple[dict[str, int], Callable[[Path], Any], str]] = {
    "half of it": ({}, forget("layer.1"), r"tensor qformer\.encoder\.layer\.1.* is missing"),
    "half of the head": ({}, forget("transform.dense"), r"tensor text\.dense.* is missing"),
    "no words": (
        {},
        forget("word_embeddings"),
        r"tensor text\.embeddings\.word_embeddings.* is missing",
    ),
    "another width": ({"hidden_size": 16}, lambda f: None, "does not fit: .*shape"),
    "fewer layers": ({"num_hidden_layers": 1}, lambda f: None, "tensor qformer.* is missing"),
    "other words": (
        {"vocab_size": 20},
        lambda f: None,
        "tensor text.bias has shape",
    ),
    "something else": ({}, add, "tensor extra is none of BERT's"),
    "torn": ({}, lambda f: cut(f / "model.safetensors"), "is torn"),
}


@pytest.mark.parametrize(("config", "change", "words"), ODD_BERTS.values(), ids=ODD_BERTS)
def test_a_bert_that_does_not_fit_is_one_line(config, change, words, tmp_path):
    folder = bert(tmp_path / "bert", **config)
    change(folder)
    connector = built("qformer", {**QFORMER, "text": str(folder)})
    with pytest.raises(UserError, match=words) as caught:
        connector.prepare_objective("blip2", fresh=True)
    assert "\n" not in str(caught.value)
