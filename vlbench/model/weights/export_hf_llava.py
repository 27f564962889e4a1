"""From a model to a folder that `LlavaForConditionalGeneration` and `AutoProcessor` load.

`export_hf_llava_next` writes its variant for images in tiles through `write_llava_folder`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.utils import logging

from vlbench.compat.transformers_internals import pil_llava_image_processor
from vlbench.data.image_processing import ImageTransform
from vlbench.errors import UserError
from vlbench.model.generation.growing_answer import eos_token_ids
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.vlm import VLM
from vlbench.model.weights import clip_layouts, vision_layouts
from vlbench.model.weights.export_hf_processor import build_llava_processor, learned_added_tokens
from vlbench.model.weights.exported_template import IMAGE_TOKEN
from vlbench.model.weights.hf_llava_layout import (
    LINEAR_ACTIVATION,
    VISION_PREFIXES,
    YI_VL_KEY,
    refuse_divided_logits,
)
from vlbench.model.weights.llava_projector import (
    projector_depth_and_norm,
    projector_tensor_name,
    require_projector,
)
from vlbench.model.weights.processor_values import RESAMPLE_CODES
from vlbench.model.weights.release_files import collect_part_states
from vlbench.model.weights.tensor_files import cast_floating
from vlbench.text_files import format_json, read_config_bytes, read_json

LAYOUT_NAME = "transformers' LLaVA"
YI_VL_LAYOUT_NAME = "LLaMA-Factory's Yi-VL"
EMBEDDING_NAME, HEAD_NAME = "model.language_model.embed_tokens.weight", "lm_head.weight"
"""Names in transformers' module of what may be tied."""


@dataclass(frozen=True)
class LlavaVariant:
    """A layout of transformers' LLaVA: its classes, and what it has beside LLaVA's own."""

    name: str = LAYOUT_NAME
    """What errors call it."""
    config_class: type[Any] = LlavaConfig
    model_class: type[Any] = LlavaForConditionalGeneration
    processor_class: type[Any] = LlavaProcessor
    config_keys: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of config.json."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Further weights, by the names of `model_class`."""


LLAVA = LlavaVariant()


class YiVLProjector(nn.Module):
    """Yi-VL's projector by the names that LLaMA-Factory's module has; a holder of weights."""

    def __init__(self, vision_width: int, width: int) -> None:
        """Build the layers; two are LayerNorms, in spite of their names."""
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, width)
        self.linear_2, self.linear_4 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.linear_3 = nn.Linear(width, width)


def write_hf_llava(
    vlm: LoadedVLM, folder: Path, dtype: torch.dtype | None, has_norms: bool = False
) -> None:
    """Write `vlm` into the empty `folder`.

    Args:
        vlm: The model.
        folder: Where to.
        dtype: None keeps the type of every tensor.
        has_norms: Whether the layout is LLaMA-Factory's for Yi-VL, whose projector has LayerNorms.

    Raises:
        UserError: when the layout cannot express the connector, encoder or tokenizer.
    """
    _check_projector(vlm, has_norms)
    if has_norms:
        clip_layouts.to_hf_vision_config(vlm.vision.visual)  # refuses other encoders
    image_processor = _build_image_processor(vlm.processor.transform)
    write_llava_folder(vlm, folder, dtype, LLAVA, image_processor, has_norms)


def write_llava_folder(
    vlm: LoadedVLM,
    folder: Path,
    dtype: torch.dtype | None,
    variant: LlavaVariant,
    image_processor: Any,
    has_norms: bool = False,
) -> None:
    """Write `vlm`, whose projector suits the layout, into the empty `folder`.

    Args:
        vlm: The model.
        folder: Where to.
        dtype: None keeps the type of every tensor.
        variant: The layout.
        image_processor: What transformers does to images.
        has_norms: Whether the projector has the LayerNorms of LLaMA-Factory's Yi-VL.

    Raises:
        UserError: when the layout cannot express the encoder, tokenizer or language model.
    """
    vision_layouts.to_hf_vision_config(vlm.vision.visual)  # refuses other encoders
    if vlm.vision.norm:
        raise UserError("vision.norm is true, which this layout cannot say; use format=vlbench")
    refuse_divided_logits(vlm.language.config, "the language model")
    processor = build_llava_processor(vlm, variant.processor_class, image_processor, variant.name)
    image_id = processor.image_token_id
    vocab_size = max(image_id + 1, vlm.language.config.vocab_size)
    processor.save_pretrained(folder)
    _write_tokenizer_files(vlm, folder, image_id)
    state = {
        name: cast_floating(tensor, dtype)
        for name, tensor in _build_llava_state_dict(vlm.model, vocab_size, variant).items()
    }
    llava_config = build_llava_config(vlm.model, image_id, vocab_size, variant)
    llava_config.dtype = llava_config.text_config.dtype = state[HEAD_NAME].dtype
    if llava_config.tie_word_embeddings:  # one tensor, which transformers writes once
        state[HEAD_NAME] = state[EMBEDDING_NAME]
    with torch.device("meta"):
        model = _build_holder(llava_config, variant, has_norms)
    model.load_state_dict(state, assign=True)
    model.generation_config = GenerationConfig(
        bos_token_id=vlm.tokenizer.bos_token_id,
        # that of the chat template too, which a language model without one does not name
        eos_token_id=sorted(eos_token_ids(vlm.model, vlm.processor)),
        pad_token_id=processor.tokenizer.pad_token_id,
        # ids that the model never learned
        suppress_tokens=list(range(vlm.tokenizer.embedding_rows, vocab_size)),
    )
    with _hide_progress_bars():
        model.save_pretrained(folder, state_dict=_with_released_vision_names(model.state_dict()))


def _write_tokenizer_files(vlm: LoadedVLM, folder: Path, image_id: int) -> None:
    """Write a sentencepiece model, so that an import of `folder` has the same tokenizer."""
    sentencepiece_file = vlm.tokenizer.folder / "tokenizer.model"
    if sentencepiece_file.name not in vlm.tokenizer.file_contents:
        return
    (folder / sentencepiece_file.name).write_bytes(read_config_bytes(sentencepiece_file))
    file = folder / "tokenizer_config.json"  # transformers 5 leaves add_bos_token out
    config = read_json(file) | {"add_bos_token": vlm.tokenizer.add_bos_token}
    file.write_text(format_json(config, indent=2) + "\n", encoding="utf-8")
    added_tokens = learned_added_tokens(vlm.tokenizer) | {IMAGE_TOKEN: image_id}
    text = format_json(added_tokens, indent=2)
    (folder / "added_tokens.json").write_text(text + "\n", encoding="utf-8")


def _check_projector(vlm: LoadedVLM, has_norms: bool) -> None:
    """Refuse a connector that the layout cannot hold."""
    if not has_norms:
        check_plain_projector(vlm, LAYOUT_NAME)
        return
    name = YI_VL_LAYOUT_NAME
    depth, norm = projector_depth_and_norm(require_projector(vlm.model.connector, name))
    if (depth, norm) != (2, True):
        raise UserError(
            f"the connector is an MLP of depth {depth}{' with LayerNorms' if norm else ''}, and "
            f"{name} holds two Linear layers with LayerNorms; format=hf_llava or format=yi_vl "
            "may hold this one, format=vlbench every connector"
        )


def check_plain_projector(vlm: LoadedVLM, layout_name: str) -> None:
    """Refuse a connector that is not one or two Linear layers without LayerNorms."""
    depth, norm = projector_depth_and_norm(require_projector(vlm.model.connector, layout_name))
    if norm or depth > 2:
        other = "yi_vl or format=yi_vl_hf" if depth == 2 else "yi_vl"
        raise UserError(
            f"the connector is an MLP of depth {depth}{' with LayerNorms' if norm else ''}, and "
            f"{layout_name} holds one or two Linear layers without; format={other} holds this "
            "one, format=vlbench every connector"
        )


def _build_holder(config: Any, variant: LlavaVariant, has_norms: bool) -> Any:
    """Return transformers' module, which names the tensors and writes them."""
    model = variant.model_class(config)
    if has_norms:
        first = model.model.multi_modal_projector.linear_1
        model.model.multi_modal_projector = YiVLProjector(first.in_features, first.out_features)
        setattr(model.config, YI_VL_KEY, True)
    return model


def _with_released_vision_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in which the encoder's tensors have the names of released folders.

    transformers 5 has taken `vision_model.` out of its module's names. It reads both; vLLM, SGLang
    and transformers 4 know the released names alone.
    """
    prefix = "model.vision_tower."
    released = f"{prefix}vision_model."
    return {
        name.replace(prefix, released, 1)
        if name.startswith(prefix) and not name.startswith(released)
        else name: tensor
        for name, tensor in state.items()
    }


@contextlib.contextmanager
def _hide_progress_bars() -> Iterator[None]:
    """Hide progress bars of transformers, and restore its settings afterwards."""
    was_enabled, hub_was_enabled = (
        logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
    )
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
        (enable_progress_bars if hub_was_enabled else disable_progress_bars)()


def build_llava_config(
    vlm: VLM, image_id: int, vocab_size: int, variant: LlavaVariant = LLAVA
) -> Any:
    """Return transformers' configuration of a model of LLaVA's layout, or of a variant."""
    depth, _ = projector_depth_and_norm(require_projector(vlm.connector, LAYOUT_NAME))
    language = {**vlm.language.config.to_dict(), "vocab_size": vocab_size}
    # vLLM finds the language model's class by this name
    language["architectures"] = [type(vlm.language).__name__]
    vision = vision_layouts.to_hf_vision_config(vlm.vision.visual)
    return variant.config_class(
        vision_config=vision_layouts.build_hf_config(vision),
        text_config=type(vlm.language.config)(**language),
        image_token_index=image_id,
        image_seq_length=vlm.shapes.patches,
        projector_hidden_act="gelu" if depth > 1 else LINEAR_ACTIVATION,
        vision_feature_layer=vlm.vision.block_index - len(vlm.vision.blocks()),
        vision_feature_select_strategy=vision_layouts.feature_selection(vision),
        tie_word_embeddings=vlm.language.config.tie_word_embeddings,
        **variant.config_keys,
    )


def _build_llava_state_dict(vlm: VLM, vocab_size: int, variant: LlavaVariant) -> dict[str, Tensor]:
    """Return the weights by the names of transformers' module, with `vocab_size` embeddings."""
    parts = collect_part_states(vlm)
    with torch.device("meta"):
        llava = variant.model_class(build_llava_config(vlm, 0, vocab_size, variant))
    hf_names = llava.state_dict()
    vision_prefix = next(p for p in VISION_PREFIXES if any(name.startswith(p) for name in hf_names))
    state = {vision_prefix + key: tensor for key, tensor in parts["vision"].items()}
    for key, tensor in parts["language"].items():
        state[key.replace("model.", "model.language_model.", 1)] = tensor
    for name in (EMBEDDING_NAME, HEAD_NAME):
        new_rows = state[name].new_zeros(vocab_size - len(state[name]), state[name].shape[1])
        state[name] = torch.cat([state[name], new_rows]) if len(new_rows) else state[name]
    projector, prefix = parts["connector"], "model.multi_modal_projector."
    layers = require_projector(vlm.connector, LAYOUT_NAME)
    for key, tensor in projector.items():
        state[prefix + projector_tensor_name(key, layers)] = tensor
    if len(layers) == 1:
        weight = projector["0.weight"]
        state[f"{prefix}linear_2.weight"] = torch.eye(len(weight)).to(weight)
        state[f"{prefix}linear_2.bias"] = torch.zeros(len(weight)).to(weight)
    return {**state, **variant.tensors}


def _build_image_processor(transform: ImageTransform) -> Any:
    """Return transformers' image processor that gives the pixels of `transform`."""
    square = {"height": transform.size, "width": transform.size}
    return pil_llava_image_processor()(
        do_pad=transform.pad,
        do_convert_rgb=True,
        size=square if transform.squash else {"shortest_edge": transform.size},
        crop_size={"height": transform.crop, "width": transform.crop},
        image_mean=list(transform.mean),
        image_std=list(transform.std),
        resample=RESAMPLE_CODES[transform.interpolation],
    )
