"""Frozen weights held in 16 bits: half the memory, and not a bit of any result changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from random_vlm import make_batch, make_sample, small_vlm
from safetensors.torch import load_file, save_file
from torch import nn

from vlbench.__main__ import main
from vlbench.connector import registry
from vlbench.model import lora_adapters
from vlbench.model.frozen_bf16 import FROZEN_DTYPE, FrozenBF16
from vlbench.model.language_model import TINY_LANGUAGE_FOLDER
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.vision_config import EMBEDDED_ENCODERS
from vlbench.model.vision_encoder import build_vision_encoder
from vlbench.train import stage_runner
from vlbench.train.checkpoint_files import named_part_weights, stored_dtype

LORA = {"rank": 3, "alpha": 6.0, "dropout": 0.0, "targets": "all-linear"}
LORA |= {"rslora": False, "dora": False, "bits": None}
SHORT = ["fit", "recipe=yivl_llava", "precision=bf16", "log.questions=2", "log.examples=0"]
SHORT += [
    "log.tensorboard=false",
    "stages.align_448.global_batch_size=2",
    "stages.chat.global_batch_size=2",
]
SHORT += ["data.questions=1"]  # processors are slow in 16 bits
TWO = ["from=align_448", "stages.align_448.steps=2", "stages.chat.steps=2"]


def rounded(part: nn.Module) -> None:
    """Make the weights of a part what they are in a file in bfloat16."""
    for parameter in part.parameters():
        parameter.data = parameter.data.to(FROZEN_DTYPE).float()


def frozen(encoder: str | None = None) -> LoadedVLM:
    """Return a small model of which the connector alone is trained."""
    vlm = small_vlm(registry.load_connector("llava_mlp"))
    if encoder:
        vlm.model.vision = build_vision_encoder(encoder, "embedded")
        vlm.model.connector = vlm.model._build_connector()
        vlm.processor = vlm.processor.with_image_inputs(
            vlm.vision.transform, vlm.connector.tokens_per_image, question_length=0
        )
    for part in (vlm.vision, vlm.language):
        rounded(part)
        part.requires_grad_(False)
    return vlm.train()


def bytes_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def test_the_blocks_take_half_the_memory_and_norms_and_embeddings_stay():
    vlm = frozen()
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    layer, block = vlm.language.model.layers[0], vlm.vision.blocks()[0]
    sizes = [bytes_of(module) for module in (layer, block, vlm.language.lm_head)]
    norms = sum(p.nbytes for n, p in layer.named_parameters() if "norm" in n)
    held = FrozenBF16(vlm.model)
    assert bytes_of(layer) == (sizes[0] - norms) // 2 + norms
    assert bytes_of(block) == sizes[1] - sum(p.nbytes for p in block.mlp.parameters())
    assert bytes_of(vlm.language.lm_head) == sizes[2] // 2
    kept = {name for name, p in vlm.model.named_parameters() if p.dtype == torch.float32}
    assert all(one in kept for one in before if "norm" in one or "ln_" in one or "embed" in one)
    assert all(name in kept for name in before if name.startswith("connector."))
    weights = named_part_weights(vlm.model, ["vision", "language"])
    written = {name: value.to(stored_dtype(value)) for name, value in weights}
    assert all(torch.equal(before[name], value) for name, value in written.items())
    held.restore_float32()
    for name, value in vlm.model.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name
    assert not layer._forward_pre_hooks and not layer._forward_hooks


def test_weights_that_do_not_fit_in_float32_beside_the_others_go_to_the_host(monkeypatch):
    vlm = frozen()
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    held = FrozenBF16(vlm.model)
    real, refused = torch.Tensor.float, []

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        if not refused or refused[-1] is not None:
            refused.append(None)
            raise torch.OutOfMemoryError("CUDA out of memory")
        refused.append(tensor)
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "float", cast)
    held.restore_float32()
    monkeypatch.undo()
    assert None in refused
    state = vlm.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_what_is_trained_or_would_be_rounded_is_not_held():
    vlm = frozen()
    layers = vlm.language.model.layers
    layers[0].mlp.up_proj.weight.data[0, 0] = 1 / 3
    layers[1].mlp.up_proj.weight.requires_grad_(True)
    FrozenBF16(vlm.model)
    assert [layer.mlp.up_proj.weight.dtype for layer in layers] == [torch.float32] * 2 + [
        FROZEN_DTYPE
    ]
    assert all(layer.mlp.down_proj.weight.dtype == FROZEN_DTYPE for layer in layers)
    tied = frozen()
    tied.language.lm_head.weight = tied.language.get_input_embeddings().weight
    FrozenBF16(tied.model)
    assert tied.language.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("encoder", [None, *EMBEDDED_ENCODERS])
@pytest.mark.parametrize("adapted", [False, True])
def test_without_autocast_all_is_computed_in_float32(encoder, adapted):
    vlm = frozen(encoder)
    if adapted:
        lora_adapters.add_adapters(vlm.language, "language", **LORA)
    batch = make_batch(vlm, [[make_sample(1), make_sample(2, images=2)]])

    def found() -> tuple[torch.Tensor, ...]:
        """Return a loss, the gradient of the visual tokens, and an answer's tokens."""
        visual = vlm.visual(batch).detach().requires_grad_()
        loss = vlm.model.language_loss(vlm.model.hidden_states(batch, visual), batch.labels)
        (slope,) = torch.autograd.grad(loss, visual)
        ask = vlm.prepare([{"role": "user", "content": "How many?"}])
        return loss, slope, torch.tensor(vlm.generate(ask, max_new_tokens=8))

    expected = found()
    FrozenBF16(vlm.model)
    assert all(torch.equal(*both) for both in zip(found(), expected, strict=True))
    assert vlm.language.model.layers[0].self_attn.q_proj.weight.dtype == FROZEN_DTYPE


def test_a_failure_in_a_block_leaves_the_weights_held():
    vlm = frozen()
    FrozenBF16(vlm.model)
    with pytest.raises(RuntimeError):
        vlm.language.model.layers[0](torch.zeros(1, 2, 7))
    assert vlm.language.model.layers[0].mlp.up_proj.weight.dtype == FROZEN_DTYPE


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Return a folder with the miniatures, their weights as files in bfloat16 have them."""
    folder = tmp_path_factory.mktemp("rounded")
    for source, name in (
        (TINY_LANGUAGE_FOLDER, "language"),
        (EMBEDDED_ENCODERS["tiny"], "vision_encoder"),
    ):
        shutil.copytree(source, folder / name)
        (file,) = (folder / name).glob("*.safetensors")
        state = {key: value.to(FROZEN_DTYPE).float() for key, value in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})
    return folder


@pytest.fixture
def parts(files, monkeypatch) -> list[str]:
    """Return the words that name these miniatures."""
    monkeypatch.setitem(EMBEDDED_ENCODERS, "tiny", files / "vision_encoder")
    return [f"language.weights={files / 'language'}"]


CASES = {
    "frozen": ["stages.align_448.train.vision=null", "stages.chat.train.language=null"],
    "lora": ["stages.chat.train.vision=null", "stages.chat.train.language.lora.rank=4"]
    + ["activation_checkpointing=full"],
    "later": [],  # what is frozen first is trained in the end
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_in_bf16_is_what_it_is_with_all_weights_in_float32(
    case, parts, tmp_path, monkeypatch
):
    words = [*SHORT, *TWO, *parts, *CASES[case]]
    blocks: list[torch.dtype] = []

    class Noted(FrozenBF16):
        def __init__(self, vlm: LoadedVLM, wanted: bool) -> None:
            super().__init__(vlm, wanted and holding)
            blocks.append(vlm.language.lm_head.weight.dtype)

    monkeypatch.setattr(stage_runner, "FrozenBF16", Noted)
    runs: dict[bool, dict[str, bytes]] = {}
    for holding in (False, True):
        run = tmp_path / str(holding)
        assert main([*words, f"run={run}"]) == 0
        files = [*run.glob("checkpoints/*/*.safetensors"), *run.glob("checkpoints/*/adapters/*/*")]
        runs[holding] = {str(file.relative_to(run)): file.read_bytes() for file in files}
        lines = (run / "metrics.csv").read_text().splitlines()
        runs[holding]["losses"] = "\n".join(",".join(x.split(",")[:6]) for x in lines).encode()
        runs[holding]["answers"] = (run / "answers.jsonl").read_bytes()
    assert runs[True] == runs[False]
    half = len(blocks) // 2
    assert set(blocks[:half]) == {torch.float32}
    assert blocks[half] == FROZEN_DTYPE and blocks[-2] == (
        torch.float32 if case == "later" else FROZEN_DTYPE
    )


def test_a_run_with_init_saves_what_it_was_given(parts, files, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    words = [*SHORT, *CASES["lora"], "only=chat"]
    assert main([*words, *parts, "stages.chat.steps=0", f"run={first}"]) == 0
    assert main([*words, "stages.chat.steps=1", f"init={first}", f"run={second}"]) == 0
    last = max((second / "checkpoints").iterdir())
    state = load_file(last / "model.safetensors")
    given = load_file(files / "language/model.safetensors")
    assert all(torch.equal(state[f"language.{name}"], value) for name, value in given.items())
