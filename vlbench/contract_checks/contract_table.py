"""The contract as a table: each check with what it means, and what to do where it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vlbench.contract_checks import (
    model_checks,
    output_checks,
    question_checks,
    training_checks,
)
from vlbench.model.loaded_vlm import LoadedVLM


class ContractCheck(NamedTuple):
    """One part of the contract."""

    name: str
    meaning: str
    """What holds where it passes, for the line `ok`."""
    remedy: str
    """What to do where it fails."""
    run_check: Callable[[LoadedVLM], None]
    """Raises a ContractViolation; the model, new and in training mode, is its own."""
    is_basic: bool = False
    """Whether the checks behind it mean nothing where it fails."""


def _accept_built(_: LoadedVLM) -> None:
    """Accept the model: that it could be built is all."""


CONTRACT = (
    ContractCheck(
        "built",
        "it takes named options, and is built for 2 x 2 patches and widths of 32",
        "take `shapes` and named options, no *args or **kwargs; where the defaults are too large "
        "for this, type smaller values: connector.OPTION=VALUE",
        _accept_built,
        is_basic=True,
    ),
    ContractCheck(
        "layers",
        "all of its layers are there when it is built",
        "make layers in __init__, with the sizes that `shapes` has: what forward makes is not "
        "trained",
        output_checks.check_layers,
        is_basic=True,
    ),
    ContractCheck(
        "shapes",
        "forward gives [images, tokens_per_image, lm_width], or a row or levels for inject",
        "set tokens_per_image to the number of tokens that forward returns",
        output_checks.check_shapes,
        is_basic=True,
    ),
    ContractCheck(
        "finite",
        "visual tokens and losses are finite numbers",
        "look for a division by zero, a log, or a tensor that is not initialised (torch.empty)",
        output_checks.check_finite,
        is_basic=True,
    ),
    ContractCheck(
        "deterministic",
        "the same images give the same numbers, in training and evaluation",
        "no dropout, no random numbers in forward or inject, nothing counted from call to call: "
        "else a step depends on how it is packed",
        output_checks.check_determinism,
        is_basic=True,
    ),
    ContractCheck(
        "inputs",
        "forward leaves the features as they are",
        "write features = features + 1, not features += 1 or features.add_(1)",
        output_checks.check_inputs,
        is_basic=True,
    ),
    ContractCheck(
        "image_use",
        "another image gives other visual tokens and another answer",
        "use `features` in forward, and the visual tokens in inject; name a gate that begins at "
        "zero `...gate`",
        output_checks.check_image_use,
    ),
    ContractCheck(
        "question",
        "a question, if it reads any, is of its own image, whatever stands beside or behind it",
        "use question.embeddings in forward, of each image its own, and question.mask: behind "
        "question.lengths is padding; a question may have no token",
        question_checks.check_question,
    ),
    ContractCheck(
        "any_grid",
        "with any_grid, a visual token is made of the patch at its place alone",
        "leave any_grid out: images in their own aspect ratios have other rows and columns than "
        "`shapes`, and fewer patches",
        output_checks.check_any_grid,
    ),
    ContractCheck(
        "size_options",
        "size_options names options, each with values that it may have",
        "write size_options = {'option': range(...)} with values of the option's type",
        output_checks.check_size_options,
    ),
    ContractCheck(
        "gradients",
        "every parameter learns something",
        "use every parameter in forward or inject, or remove it; name a gate that begins at zero "
        "`...gate`",
        training_checks.check_every_parameter_learns,
    ),
    ContractCheck(
        "neighbours",
        "a sample does not notice its neighbours in a packed row",
        "no statistics over the images of a batch (BatchNorm, a mean over all); in inject, let "
        "where.image_index say which image a position may see",
        training_checks.check_neighbours,
    ),
    ContractCheck(
        "views",
        "what it injects of a tiled image is of all of its views, and of no other's",
        "in inject, give attend_to_images where.view_bounds, and take what image positions hold "
        "from where.own_tokens: `visual` has an entry for each view, not for each image",
        training_checks.check_views,
    ),
    ContractCheck(
        "objectives",
        "objectives of its own do not depend on the packing",
        "take negatives from batch.contrast_pool (docs/objectives.md)",
        training_checks.check_objectives,
    ),
    ContractCheck(
        "text_alone",
        "a batch without images gives every parameter a gradient, as DDP demands",
        "let every path of the loss touch all parameters (zero_like_loss adds nothing but that)",
        training_checks.check_text_alone,
    ),
    ContractCheck(
        "recomputation",
        "computing activations again changes nothing",
        "inject must change nothing outside of itself: no counters, no attributes",
        training_checks.check_recomputation,
    ),
    ContractCheck(
        "generation",
        "generation with a KV cache equals recomputation",
        "inject must treat each position by itself: with a cache it sees the new ones alone",
        model_checks.check_generation,
    ),
    ContractCheck(
        "cost",
        "its cost is counted without taking memory",
        "forward must work on tensors without values (device meta): no .item(), no if on a value",
        output_checks.check_cost,
    ),
    ContractCheck(
        "saved_state",
        "a saved state gives the same loss",
        "keep what forward uses in parameters and buffers (register_buffer)",
        output_checks.check_saved_state,
    ),
    ContractCheck(
        "device",
        "forward computes on the device of its inputs, as a GPU's",
        "keep constants with register_buffer(..., persistent=False), make tensors with "
        "device=features.device; no .item() and no if on a value",
        output_checks.check_device,
    ),
    ContractCheck(
        "tensor_names",
        "the language model's tensors keep their names",
        "do not attach modules to the language model: inject_layers and inject are the way",
        model_checks.check_tensor_names,
    ),
    ContractCheck(
        "lora",
        "it works with LoRA in the language model, merged and not",
        "use what forward and inject are given, not the language model's weights",
        model_checks.check_lora,
    ),
    ContractCheck(
        "diagnostics",
        "what an answer depends on is measured, and measuring changes nothing",
        "let gradients flow from visual tokens to features (no detach, no in-place writes)",
        model_checks.check_diagnostics,
    ),
    ContractCheck(
        "attention",
        "patch_attention, if it gives any, has a share for each patch",
        "return [images, visual tokens, patches] whose rows sum to 1, or None",
        output_checks.check_attention,
    ),
    ContractCheck(
        "metrics",
        "metrics are numbers",
        "return {name: float}: .item() makes a float of a tensor",
        output_checks.check_metrics,
    ),
    ContractCheck(
        "image_size",
        "another image size is taken, in training and generation",
        "build everything from `shapes`; adapt() resizes what depends on it",
        model_checks.check_image_size,
    ),
)
