"""Private parts of transformers: the decoder's arguments, KV caches, attention, image processors.

Checked with transformers 5.24; 5.17 is the oldest that vlbench allows.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import DynamicCache, LlamaConfig, PretrainedConfig, StaticCache


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


def set_attention(config: PretrainedConfig, name: str) -> None:
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


def llama_rotary_embedding(config: LlamaConfig) -> nn.Module:
    """Build `LlamaRotaryEmbedding`, whose buffers follow from the configuration.

    It is put into a model that was built on `meta` (as `model.rotary_emb`), and checks the
    configuration's numbers. If the class or the attribute goes, no language model can be loaded.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(config)


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


def blip2_text_embeddings(config: PretrainedConfig) -> nn.Module:
    """Build the word and position embeddings of BLIP-2's Q-Former, which its model leaves out.

    `models.blip_2.modeling_blip_2.Blip2TextEmbeddings`, called with `input_ids`. If it moves, the
    Q-Former has no first stage (`objective: blip2`).
    """
    from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

    embeddings: Any = Blip2TextEmbeddings
    return embeddings(config)  # type: ignore[no-any-return]
