"""How the connector fits the rest: generation, LoRA, diagnostics, image sizes, names of tensors."""

from __future__ import annotations

import peft
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from vlbench.connector.levels import first_level
from vlbench.contract_checks.gradient_comparison import language_loss, step_loss
from vlbench.contract_checks.small_model import (
    IMAGE_SIDE,
    build_small_language,
    extend_prompt,
    make_double_batch,
    make_question,
    make_sample,
)
from vlbench.contract_checks.violations import require, require_none
from vlbench.evaluate.attention_diagnostics import diagnose_answers
from vlbench.evaluate.heldout_questions import EvalQuestion
from vlbench.model.loaded_vlm import LoadedVLM


def check_generation(vlm: LoadedVLM) -> None:
    """Generation with a KV cache, several prompts at once, equals recomputing each prompt."""
    asked = [make_question(1), make_question(2, images=2, words=30), make_question(3, images=0)]
    together = vlm.generate(vlm.processor.collate_prompts(asked), max_new_tokens=6)
    for number, (one, expected) in enumerate(zip(asked, together, strict=True), 1):
        prompt = vlm.processor.collate_prompts([one])
        for position, token in enumerate(expected, 1):
            logits = vlm(prompt).logits
            assert logits is not None  # the prompt has no labels
            require(
                int(logits[0, -1, : vlm.tokenizer.embedding_rows].argmax()) == token,
                f"token {position} of answer {number} is another one without the cache",
            )
            prompt = extend_prompt(prompt, token)


def check_tensor_names(vlm: LoadedVLM) -> None:
    """The language model's tensors keep their names, so that its weights still load."""
    changed = sorted(set(vlm.language.state_dict()) ^ set(build_small_language().state_dict()))
    require_none(changed, "the connector adds or renames")


def check_lora(vlm: LoadedVLM) -> None:
    """With LoRA in the language model everything learns, and merging changes nothing."""
    prompt = vlm.processor.collate_prompts([make_question(2, images=2)])
    samples = [[make_sample(1), make_sample(2, images=2)], [make_sample(3, images=0)]]
    rows = make_double_batch(vlm, samples)
    vlm.language.requires_grad_(False)
    torch.manual_seed(1)
    peft.inject_adapter_in_model(LoraConfig(r=2, target_modules="all-linear"), vlm.language)
    adapters = {n: p for n, p in vlm.language.named_parameters() if p.requires_grad}
    for parameter in adapters.values():
        parameter.data.normal_(std=0.1)
    step_loss(vlm, rows).backward()
    still = [name for name, p in adapters.items() if p.grad is None or not p.grad.any()]
    still += [name for name, p in vlm.connector.named_parameters() if p.grad is None]
    require_none(still, "no gradient for")
    answer, loss = vlm.generate(prompt, max_new_tokens=4), language_loss(vlm, rows)
    for module in vlm.language.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    merged = language_loss(vlm, rows)
    require(torch.allclose(merged, loss, 1e-7, 1e-7), f"merged loss {merged:.6g}, not {loss:.6g}")
    require(vlm.generate(prompt, max_new_tokens=4) == answer, "merging changes the answer")


def check_diagnostics(vlm: LoadedVLM) -> None:
    """Looking at what the answers depend on gives shares of patches, and changes nothing."""
    vlm.language.requires_grad_(False)
    rows = make_double_batch(vlm, [[make_sample(1), make_sample(2, images=2)]])
    before, found = language_loss(vlm, rows), _observable_state(vlm)
    told = diagnose_answers(
        vlm, [(EvalQuestion(make_question(2, images=2), "two", "", "en"), "three")]
    )
    require(_observable_state(vlm) == found, "modes, random state or trained parameters changed")
    require(language_loss(vlm, rows).equal(before), "the loss is another one afterwards")
    require(all(p.grad is None for p in vlm.parameters()), "gradients were left behind")
    first, tokens = told["maps"][0], told["tokens"]
    require(first["relevance"] is not None, "the answer does not depend on the image")
    relevance = torch.tensor(first["relevance"])
    require(
        list(relevance.shape) == first["grid"] == list(vlm.model.shapes.grid),
        f"relevance is {list(relevance.shape)}, the grid {list(vlm.model.shapes.grid)}",
    )
    is_share = bool(relevance.min() >= 0) and abs(float(relevance.sum()) - 1) < 1e-4
    require(is_share, "relevance is not shares with the sum 1")
    used = told["effective"]
    require(
        len(tokens) == first_level(vlm.visual(rows)).shape[1] and 1 <= used <= len(tokens) + 1e-4,
        f"{used} of {len(tokens)} visual tokens are said to be used",
    )


def check_image_size(vlm: LoadedVLM) -> None:
    """A larger image size is taken, in training and generation."""
    vlm.set_image_size(2 * IMAGE_SIDE)
    loss = language_loss(vlm, make_double_batch(vlm, [[make_sample(1, images=2)]]))
    require(bool(loss.isfinite()), "the loss is NaN or infinite")
    asked = vlm.processor.collate_prompts([make_question(1)])
    require(bool(vlm.generate(asked, max_new_tokens=2)), "it generates nothing")


def _observable_state(vlm: LoadedVLM) -> tuple[list[bool], list[bool], list[int]]:
    modes = [module.training for module in vlm.model.modules()]
    trained = [parameter.requires_grad for parameter in vlm.model.parameters()]
    return modes, trained, torch.get_rng_state().tolist()
