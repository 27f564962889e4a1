"""Private parts of transformers: the decoder's arguments, KV caches, attention, image processors.

Checked with transformers 5.24; 5.17 is the oldest that vlbench allows.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import DynamicCache, PreTrainedConfig, StaticCache


_TRACKER_LOCK = threading.Lock()


@functools.cache
def cache_argument_name() -> str:
    """Return the name of the argument of `LlamaModel.forward` that takes the KV cache.

    It was `past_key_values` until transformers 5.23 and is `cache` since. A wrong name is passed on
    to the layers as an unknown keyword, and every token is decoded without what came before it.
    """
    from transformers import LlamaModel

    parameters = inspect.signature(LlamaModel.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def decoder_layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden states that `LlamaModel` gives a layer, from arguments of a pre-hook.

    They are the first positional argument, or `hidden_states`. Keywords that `LlamaModel.forward`
    does not know (`visual`, `image_index`, `lengths`, `bounds`) reach every layer; if they no
    longer do, injection and attention over packed rows raise a KeyError.
    """
    return args[0] if args else kwargs["hidden_states"]  # type: ignore[no-any-return]


def replace_decoder_layer_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a decoder layer with other hidden states."""
    if args:
        return (hidden, *args[1:]), dict(kwargs)
    return args, {**kwargs, "hidden_states": hidden}


def set_attention(config: PreTrainedConfig, name: str) -> None:
    """Choose the attention function of a model that is built from `config` by its name.

    `_attn_implementation` takes names that `AttentionInterface` knows. If it changes, packed rows
    are attended to as if they were one sample.
    """
    config._attn_implementation = name


def sdpa_attention() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return transformers' attention by `scaled_dot_product_attention`, and its mask function.

    `integrations.sdpa_attention.sdpa_attention_forward` and `masking_utils.sdpa_mask`, which padded
    batches and caches go through. If they move, nothing can be built.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    return sdpa_attention_forward, sdpa_mask


def passed_through_mask(device: torch.device) -> Tensor:
    """Return an empty mask that `LlamaModel` hands to its layers as it is.

    Packed rows bring the lengths of their samples instead. A mask of four dimensions is taken as
    ready; without one, transformers would look for samples in the position ids, which makes the
    host wait for a GPU, and build a dense mask. If that changes, layers get a dense mask.
    """
    import torch

    return torch.empty(0, 0, 0, 0, dtype=torch.bool, device=device)


def decoder_classes(model_type: str) -> tuple[type[Any], type[Any]]:
    """Return the classes of configuration and language model of an architecture of transformers.

    `MODEL_FOR_CAUSAL_LM_MAPPING` has the one for texts, by the class of its configuration.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config_class = known_model_types()[model_type]
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    return config_class, model_class


def known_model_types() -> Mapping[str, type[Any]]:
    """Return transformers' classes of configurations by `model_type`."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING


def rotary_embedding(config: PreTrainedConfig) -> nn.Module:
    """Build the rotary positions of a decoder, whose buffers follow from the configuration.

    They are put into a model that was built on `meta` (as `model.rotary_emb`), and check the
    configuration's numbers. The class stands beside the model's, as `LlamaRotaryEmbedding` beside
    `LlamaForCausalLM`. If it or the attribute goes, no language model can be loaded.
    """
    _, model_class = decoder_classes(config.model_type)
    name = model_class.__name__.removesuffix("ForCausalLM") + "RotaryEmbedding"
    rotary_class = getattr(sys.modules[model_class.__module__], name)
    return rotary_class(config=config)  # type: ignore[no-any-return]


def crop_kv_cache(cache: DynamicCache, position_count: int) -> None:
    """Keep the first `position_count` positions of a cache that has more.

    `DynamicCache.crop` takes the number to remove, negative; in older versions a
    positive one was the number to keep, now it raises a ValueError.
    """
    cache.crop(position_count - cache.get_seq_length())


def repeat_kv_cache(cache: DynamicCache, row_count: int) -> None:
    """Repeat the one row of a cache for `row_count` rows, in place."""
    cache.batch_repeat_interleave(row_count)


def kv_cache_layers(cache: DynamicCache) -> list[Any]:
    """Return the layers of a cache, `.keys` and `.values` `[rows, heads, positions, head width]`.

    The list is the cache's own. If the attributes change, compiled decoding breaks.
    """
    return cache.layers


def static_cache_position(cache: StaticCache) -> Tensor:
    """Return the position that the next token takes in a cache of fixed length, int64 `[1]`.

    It stays on the device, where the cache counts: as a number it would be part of a compiled
    graph. `StaticLayer.cumulative_length`; if it is renamed, compiled decoding breaks.
    """
    layer: Any = cache.layers[0]
    position: Tensor = layer.cumulative_length
    return position.view(1)


def pil_llava_image_processor() -> type[Any]:
    """Return LLaVA's image processor that resizes with PIL, as the reference does.

    `models.llava.image_processing_pil_llava.LlavaImageProcessorPil`; the other ones resize with
    torch and give other pixels. If it moves, `export format=hf_llava` breaks.
    """
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    return LlavaImageProcessorPil


def pil_llava_next_image_processor() -> type[Any]:
    """Return LLaVA-NeXT's image processor that resizes with PIL.

    `models.llava_next.image_processing_pil_llava_next.LlavaNextImageProcessorPil`; if it moves,
    `export format=hf_llava_next` breaks.
    """
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    return LlavaNextImageProcessorPil


def compile_chat_template(text: str) -> Any:
    """Compile a Jinja chat template in the sandbox in which transformers renders them.

    `utils.chat_template_utils._compile_jinja_template`, which keeps what it has compiled; code in a
    template cannot reach files or the interpreter. If it moves, `language.template=auto` breaks.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(text)


def template_marks(template: Any, variables: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return where the `{% generation %}` marks of a compiled chat template lie in its text.

    The extension of transformers' sandbox that finds them is `activate_tracker`; characters from
    and to. One thread at a time: in transformers 5.17 the extension itself holds what it finds.
    """
    blocks: list[str] = []
    spans: list[tuple[int, int]] = []
    with _TRACKER_LOCK, template.environment.activate_tracker(blocks, spans):
        for block in template.generate(**variables):
            blocks.append(block)  # noqa: PERF402  # the extension reads the list while it grows
    return spans


def blip2_text_embeddings(config: PreTrainedConfig) -> nn.Module:
    """Build the word and position embeddings of BLIP-2's Q-Former, which its model leaves out.

    `models.blip_2.modeling_blip_2.Blip2TextEmbeddings`, called with `input_ids`. If it moves, the
    Q-Former has no first stage (`objective: blip2`).
    """
    from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

    embeddings: Any = Blip2TextEmbeddings
    return embeddings(config)  # type: ignore[no-any-return]
