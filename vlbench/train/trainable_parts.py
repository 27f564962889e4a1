"""Which parameters a stage trains, and which parts a checkpoint must therefore hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from vlbench.config.key_types import PART_NAMES
from vlbench.config.model_schema import ModelConfig
from vlbench.config.stage_schema import PartTrainConfig, StageConfig
from vlbench.errors import UserError, suggest_name
from vlbench.model import lora_adapters
from vlbench.model.vision_encoder import VisionEncoder
from vlbench.model.vlm import VLM


def freeze_untrained_parts(vlm: VLM, stage: StageConfig) -> None:
    """Prepare the model for a stage: exactly the parts that it names require gradients.

    LoRA adapters are added where the stage asks for them, and merged where it trains all weights.
    """
    vlm.set_objective(stage.objective)
    for name, part in vlm.named_parts():
        train_config = stage.trained_parts.get(name)
        if train_config is not None and train_config.lora is not None:
            lora_adapters.add_adapters(part, f"train.{name}", **vars(train_config.lora))
        elif train_config is not None:
            lora_adapters.merge_adapters(part)
        part.requires_grad_(False)
        for parameter in trained_parameters(vlm, name, train_config):
            parameter.requires_grad_(True)
    vlm.train()


def trained_parameters(
    vlm: VLM, part_name: str, train_config: PartTrainConfig | None
) -> list[nn.Parameter]:
    """Return the parameters of a part that `train_config` trains; [] for a frozen part (None)."""
    if train_config is None:
        return []
    part = getattr(vlm, part_name)
    is_encoder = isinstance(part, VisionEncoder)
    used = part.used_parameters() if is_encoder else list(part.parameters())
    if train_config.lora is None:
        return used
    adapters = {id(parameter) for parameter in lora_adapters.adapter_parameters(part).values()}
    return [parameter for parameter in used if id(parameter) in adapters]


def check_trainable_stage(vlm: VLM, stage_name: str, stage: StageConfig, total_steps: int) -> None:
    """Refuse an objective, LoRA targets, or parts without parameters that cannot be trained."""
    check_objective(vlm, stage_name, stage)
    check_trainable_params(vlm, stage_name, stage, total_steps)
    for part, train_config in stage.trained_parts.items():
        if train_config.lora:
            lora_adapters.check_adapters(
                getattr(vlm, part),
                f"stages.{stage_name}.train.{part}",
                train_config.lora.targets,
                train_config.lora.bits,
            )


def check_four_bit_stages(
    config: ModelConfig, stages: Mapping[str, StageConfig], is_sharded: bool
) -> None:
    """Refuse `lora.bits=4` where weights in 4 bits would be saved, merged with adapters or sharded.

    Checkpoints have the adapters alone, and a run that goes on quantizes the files that its recipe
    names. So the weights are those of the files in all stages, and in 4 bits from one stage on.
    """
    loras = {
        name: settings.lora if (settings := stage.trained_parts.get("language")) else None
        for name, stage in stages.items()
    }
    first = next((name for name, lora in loras.items() if lora and lora.bits), None)
    if first is None:
        return
    key, source = f"stages.{first}.train.language.lora.bits is 4", config.init
    if source or config.language.weights == "random":
        origin = f"init={source}" if source else "language.weights=random"
        raise UserError(
            f"{key}, and with {origin} checkpoints hold the whole language model, which cannot be "
            "saved in 4 bits: name its files in language.weights, or leave bits out"
        )
    if is_sharded:
        raise UserError(
            f"{key}, and weights in 4 bits cannot be sharded: trainer.strategy=ddp, or leave bits "
            "out"
        )
    names = list(stages)
    earlier, later = names[: names.index(first)], names[names.index(first) + 1 :]
    others = [name for name in earlier if "language" in stages[name].trained_parts]
    others += [name for name in later if loras[name] != loras[first]]
    if others:
        raise UserError(
            f"{key}, and stages.{others[0]}.train.language is another: weights in 4 bits cannot be "
            "merged with adapters nor saved. No stage before may train the language model, and "
            "those behind must have the same lora; or leave bits out"
        )


def check_objective(vlm: VLM, stage_name: str, stage: StageConfig) -> None:
    """Refuse an objective that the connector does not offer, or that does not fit the stage."""
    offered = ("language", *vlm.connector.objectives())
    if stage.objective not in offered:
        raise UserError(
            f"stages.{stage_name}.objective is '{stage.objective}'; this connector offers "
            f"{', '.join(offered)}.{suggest_name(stage.objective, offered)}"
        )
    if stage.objective == "language":
        return
    if stage.sample_format != "caption":
        raise UserError(
            f"stages.{stage_name}.sample_format is '{stage.sample_format}'; objective "
            f"{stage.objective} learns from images and captions: sample_format=caption"
        )
    if "language" in stage.trained_parts:
        raise UserError(
            f"stages.{stage_name}.train.language: objective {stage.objective} leaves the language "
            f"model out, so it cannot be trained: stages.{stage_name}.train.language=null"
        )


def check_trainable_params(vlm: VLM, stage_name: str, stage: StageConfig, total_steps: int) -> None:
    """Refuse a stage whose trained parts have no parameters, as a connector that only averages."""
    if total_steps and not any(
        train_config.lora or trained_parameters(vlm, name, train_config)
        for name, train_config in stage.trained_parts.items()
    ):
        parts = ", ".join(stage.trained_parts)
        raise UserError(
            f"stages.{stage_name}.train names {parts}, which has no parameters here: nothing "
            "would be trained; train another part, or leave the stage out"
        )


def parts_to_save(stages: Sequence[StageConfig], always_saved: Sequence[str]) -> list[str]:
    """Return the parts that a checkpoint of the last of `stages` must hold, in the model's order.

    These are the parts whose weights the stages changed, and `always_saved`: parts whose first
    weights are in no file that the recipe names.
    """
    return [part for part in PART_NAMES if part in always_saved or _is_part_changed(part, stages)]


def _is_part_changed(part: str, stages: Sequence[StageConfig]) -> bool:
    """Tell whether stages change the base weights of a part.

    Training all weights does; so does merging LoRA adapters when a later stage has other ones.
    """
    lora_configs = [
        stage.trained_parts[part].lora for stage in stages if part in stage.trained_parts
    ]
    return any(lora is None or lora != lora_configs[0] for lora in lora_configs)
