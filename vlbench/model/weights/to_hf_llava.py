"""From a model to a folder that `LlavaForConditionalGeneration` and `AutoProcessor` load."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils import logging

from vlbench.data.sample import Turn
from vlbench.data.template import Template
from vlbench.data.tokenizer import Tokenizer
from vlbench.files import read_json
from vlbench.mistakes import Mistake
from vlbench.model.vlm import VLM
from vlbench.model.weights import clip
from vlbench.model.weights.hf_llava import LINEAR, TOWERS
from vlbench.model.weights.projector import form_of, projector_of
from vlbench.model.weights.release import states_of

LAYOUT = "transformers' LLaVA"
IMAGE = "<image>"
Cast = Callable[[Tensor], Tensor]


def write_hf_llava(vlm: VLM, folder: Path, cast: Cast | None) -> None:
    """Write `vlm` into the empty `folder`; `cast` changes the type of every tensor."""
    depth, norm = form_of(projector_of(vlm, LAYOUT))
    if norm or depth > 2:
        raise Mistake(
            f"the connector is an MLP of depth {depth}{' with LayerNorms' if norm else ''}, and "
            f"{LAYOUT} holds one or two Linear layers without; format=yi_vl holds this one, "
            "format=vlbench every connector"
        )
    if vlm.vision.norm:
        raise Mistake("vision.norm is true, which this layout cannot say; use format=vlbench")
    made = processor(vlm)
    image_id = made.image_token_id
    rows = max(image_id + 1, vlm.language.config.vocab_size)
    made.save_pretrained(folder)
    pieces = vlm.tokenizer.folder / "tokenizer.model"
    if pieces.is_file():  # so that the way back has the tokenizer itself
        (folder / pieces.name).write_bytes(pieces.read_bytes())
        file = folder / "tokenizer_config.json"  # transformers 5 does not say it
        said = read_json(file) | {"add_bos_token": vlm.tokenizer.add_bos}
        file.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        known = words_added(vlm.tokenizer) | {IMAGE: image_id}
        names = json.dumps(known, indent=2, ensure_ascii=False)
        (folder / "added_tokens.json").write_text(names + "\n", encoding="utf-8")
    state = _state(vlm, rows)
    if cast:
        state = {name: cast(tensor) for name, tensor in state.items()}
    config = _config(vlm, image_id, rows)
    config.dtype = state["lm_head.weight"].dtype
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    model.load_state_dict(state, assign=True)
    model.generation_config = GenerationConfig(
        bos_token_id=vlm.tokenizer.bos,
        eos_token_id=vlm.language.generation_config.eos_token_id,
        pad_token_id=made.tokenizer.pad_token_id,
        suppress_tokens=list(range(vlm.tokenizer.rows, rows)),  # no words of the model
    )
    with _no_bar():
        model.save_pretrained(folder)


@contextlib.contextmanager
def _no_bar() -> Iterator[None]:
    """Have transformers show no progress bar, and leave its settings as they were."""
    shown, hub_shown = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        (enable_progress_bars if hub_shown else disable_progress_bars)()


def _config(vlm: VLM, image_id: int, rows: int) -> LlavaConfig:
    depth, _ = form_of(projector_of(vlm, LAYOUT))
    language = {**vlm.language.config.to_dict(), "vocab_size": rows}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**clip.config_of(vlm.vision.visual)),
        text_config=LlamaConfig(**language),
        image_token_index=image_id,
        image_seq_length=vlm.shapes.patches,
        projector_hidden_act="gelu" if depth == 2 else LINEAR,
        vision_feature_layer=vlm.vision.index - len(vlm.vision.blocks()),
        vision_feature_select_strategy="default",
        tie_word_embeddings=vlm.language.config.tie_word_embeddings,
    )


def _state(vlm: VLM, rows: int) -> dict[str, Tensor]:
    """Return the weights under the names of transformers' module, with `rows` embeddings."""
    parts = states_of(vlm)
    with torch.device("meta"):
        theirs = LlavaForConditionalGeneration(_config(vlm, 0, rows)).state_dict()
    tower = next(start for start in TOWERS if any(name.startswith(start) for name in theirs))
    state = {tower + key: tensor for key, tensor in parts["vision"].items()}
    for key, tensor in parts["language"].items():
        state[key.replace("model.", "model.language_model.", 1)] = tensor
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        more = state[name].new_zeros(rows - len(state[name]), state[name].shape[1])
        state[name] = torch.cat([state[name], more]) if len(more) else state[name]
    connector, start = parts["connector"], "model.multi_modal_projector."
    for kind in ("weight", "bias"):
        state[f"{start}linear_1.{kind}"] = connector[f"0.{kind}"]
    first = connector["0.weight"]
    width = len(first)
    identity = {"weight": torch.eye(width).to(first), "bias": torch.zeros(width).to(first)}
    for kind in ("weight", "bias"):
        state[f"{start}linear_2.{kind}"] = connector.get(f"2.{kind}", identity[kind])
    return state


def processor(vlm: VLM) -> LlavaProcessor:
    """Return the processor that makes of messages and pictures what `VLM.prepare` makes of them."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(vlm.tokenizer.folder)
    texts = [vlm.template.prompt([Turn("human", "What? 12.5 km\n\n  是什么？")]), " a", "\n"]
    for text in (*texts, *(f"a{name} b" for name in words_added(vlm.tokenizer))):
        if tokenizer.encode(text) != vlm.tokenizer.encode(text):
            raise Mistake(
                f"transformers' tokenizer gives other ids than the model's for {text!r}, so the "
                "export would answer otherwise; use format=vlbench"
            )
    _pad(tokenizer, vlm.language.config.vocab_size)
    extra = [name for name in vlm.tokenizer.special_added if name != IMAGE]
    tokenizer.add_special_tokens({"additional_special_tokens": [*extra, IMAGE]})
    if tokenizer.convert_tokens_to_ids(IMAGE) < vlm.tokenizer.rows:
        raise Mistake(
            f"{IMAGE} is a token of the model (id {tokenizer.convert_tokens_to_ids(IMAGE)}), and "
            f"{LAYOUT} uses it for pictures; use format=vlbench"
        )
    transform = vlm.transform
    images = LlavaImageProcessorPil(  # the one that resizes as the reference does, with PIL
        do_pad=transform.pad,
        do_convert_rgb=True,
        size={"shortest_edge": transform.size},
        crop_size={"height": transform.crop, "width": transform.crop},
        image_mean=list(transform.mean),
        image_std=list(transform.std),
        resample=3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=transform.crop // vlm.vision.grid[0],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which is then left out
        image_token=IMAGE,
        chat_template=jinja(vlm.template),
    )


def words_added(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the added tokens that the model has learned, with their ids."""
    return {name: index for name, index in tokenizer.added.items() if index < tokenizer.rows}


def _pad(tokenizer: PreTrainedTokenizerFast, rows: int) -> None:
    """Let prompts of a batch end together, since answers begin there, and fill them on the left.

    The model reads the filling, hidden by the mask, so it needs one of its `rows` embeddings.
    """
    tokenizer.padding_side = "left"
    pad = tokenizer.pad_token_id
    if pad is None or pad >= rows:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def jinja(template: Template) -> str:
    """Return a chat template in transformers' language that writes what `Template` writes."""
    text = (
        "{%- macro text(content) -%}"
        "{%- if content is string -%}{{ content }}{%- else -%}"
        "{%- for part in content -%}"
        "{%- if not loop.first and not (part['type'] == 'image' and "
        "loop.previtem['type'] == 'image') -%}{{ '\\n' }}{%- endif -%}"
        f"{{{{ {IMAGE!r} if part['type'] == 'image' else part['text'] }}}}"
        "{%- endfor -%}{%- endif -%}"
        "{%- endmacro -%}"
        "{%- if messages[0]['role'] == 'system' -%}"
        "{%- set system = text(messages[0]['content']) -%}{%- set turns = messages[1:] -%}"
        "{%- else -%}"
        f"{{%- set system = {template.system!r} -%}}{{%- set turns = messages -%}}"
        "{%- endif -%}"
    )
    head = f"{{{{ {template.before_system!r} + system + {template.after_system!r} }}}}"
    text += f"{{%- if system -%}}{head}{{%- endif -%}}" if template.before_system else head
    return text + (
        "{%- for turn in turns -%}"
        "{%- if turn['role'] == 'user' -%}"
        f"{{{{ {template.before_human!r} + text(turn['content']) + {template.before_answer!r} }}}}"
        "{%- else -%}"
        f"{{{{ {template.answer_start!r} + text(turn['content']) | trim + "
        f"{template.answer_end!r} }}}}"
        f"{{%- if not loop.last -%}}{{{{ {template.after_answer!r} }}}}{{%- endif -%}}"
        "{%- endif -%}"
        "{%- endfor -%}"
    )
