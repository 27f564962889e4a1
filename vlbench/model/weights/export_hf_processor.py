"""The tokenizer and the image processor of an export, as transformers' own objects."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from vlbench.data.sample import ChatTurn
from vlbench.data.tokenizer import Tokenizer
from vlbench.errors import UserError
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.weights import vision_layouts
from vlbench.model.weights.exported_template import IMAGE_TOKEN, to_jinja_template


def build_llava_processor(
    vlm: LoadedVLM, processor_class: type[Any], image_processor: Any, layout_name: str
) -> Any:
    """Return transformers' processor that makes the same inputs as `Processor.prepare`.

    Args:
        vlm: The model.
        processor_class: `LlavaProcessor`, or one that takes the same arguments.
        image_processor: What it gives images to.
        layout_name: What errors call the layout.

    Raises:
        UserError: when transformers' tokenizer does other than the model's.
    """
    adds_bos = vlm.tokenizer.encode("a") != vlm.tokenizer.encode("a", add_bos=False)
    return processor_class(
        image_processor=image_processor,
        tokenizer=_build_tokenizer(vlm, layout_name),
        patch_size=vlm.processor.transform.crop // vlm.vision.grid[0],
        vision_feature_select_strategy=vision_layouts.feature_selection(
            vision_layouts.to_hf_vision_config(vlm.vision.visual)
        ),
        # the class token, which LLaVA drops again
        num_additional_image_tokens=int(vlm.vision.has_class_token),
        image_token=IMAGE_TOKEN,
        chat_template=to_jinja_template(vlm.processor.template, adds_bos),
    )


def _build_tokenizer(vlm: LoadedVLM, layout_name: str) -> Any:
    """Return transformers' tokenizer with a token for images, after a comparison with ours."""
    folder = vlm.tokenizer.folder
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)  # nosec B615: a local folder
    probe_texts = [
        vlm.processor.template.render_prompt([ChatTurn("human", "What? 12.5 km\n\n  是什么？")]),
        " a",
        "\n",
    ]
    for text in (*probe_texts, *(f"a{name} b" for name in learned_added_tokens(vlm.tokenizer))):
        if tokenizer.encode(text) != vlm.tokenizer.encode(text):
            raise UserError(
                f"transformers' tokenizer gives other ids than the model's for {text!r}, so the "
                "export would answer otherwise; use format=vlbench"
            )
    _set_left_padding(tokenizer, vlm.language.config.vocab_size)
    special_tokens = [name for name in vlm.tokenizer.added_special_tokens if name != IMAGE_TOKEN]
    tokenizer.add_special_tokens({"additional_special_tokens": [*special_tokens, IMAGE_TOKEN]})
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) < vlm.tokenizer.embedding_rows:
        raise UserError(
            f"{IMAGE_TOKEN} is a token of the model (id "
            f"{tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)}), and "
            f"{layout_name} uses it for images; use format=vlbench"
        )
    return tokenizer


def learned_added_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the added tokens that have an embedding in the model, with their ids."""
    return {
        name: index
        for name, index in tokenizer.added_tokens.items()
        if index < tokenizer.embedding_rows
    }


def _set_left_padding(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """Pad prompts of a batch on the left, so that all answers begin at the same position.

    Padding is masked but embedded, so its id must be below `vocab_size`.
    """
    tokenizer.padding_side = "left"
    pad = tokenizer.pad_token_id
    if pad is None or pad >= vocab_size:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
