"""The model card of an export: what it is made of, how it was trained, how good, how to use it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlbench.command_line.overrides import format_override
from vlbench.compat.vision_internals import encoder_width
from vlbench.config.model_schema import ModelConfig
from vlbench.config.stage_schema import StageConfig, StageData
from vlbench.data.data_sources import RENDERED_SOURCES
from vlbench.model.decoder_families import family_label
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.text_files import format_json
from vlbench.text_tables import markdown_text
from vlbench.train.checkpoint_files import RunPosition
from vlbench.version import __version__

TRANSFORMERS_LAYOUTS = ("hf_llava", "hf_llava_next", "yi_vl_hf")


def _transformers_usage(name: str, class_prefix: str) -> str:
    """Return how transformers' model of that name answers; its values are filled in later."""
    return f"""\
This is transformers' {name}:

    from PIL import Image
    from transformers import AutoProcessor, {class_prefix}ForConditionalGeneration
    model = {class_prefix}ForConditionalGeneration.from_pretrained({{to_text}})
    processor = AutoProcessor.from_pretrained({{to_text}}, backend="pil")
    content = [{{{{"type": "image"}}}}, {{{{"type": "text", "text": "What is it?"}}}}]
    prompt = processor.apply_chat_template([{{{{"role": "user", "content": content}}}}])
    image = Image.open("image.png").convert("RGB")
    image.info.clear()
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    new = model.generate(
        **inputs, max_new_tokens=256, stop_strings=["{{stop}}"], tokenizer=processor.tokenizer)
    print(processor.decode(new[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))

`convert` and `clear` drop transparency, as in training; transformers would lay it on white.
`backend="pil"` resizes images as in training; the other backend is up to one grey level off,
which moves logits in the first decimal. Gray images of 16 bits are for vlbench, which scales them:
Pillow cuts off what is above 255."""


USAGE_TEXTS = {
    "yi_vl": """\
This is the layout of the released Yi-VL models: their authors' inference code loads it, and so does

    import vlbench
    vlm = vlbench.load({to_text})
    image = {{"type": "image", "image": "image.png"}}
    content = [image, {{"type": "text", "text": "What is it?"}}]
    print(vlm.chat([{{"role": "user", "content": content}}]))
""",
    "hf_llava": _transformers_usage("LLaVA", "Llava")
    + """ Several questions at once: give lists to `images` and
`text`, and `padding=True`; prompts are filled on the left, where answers do not suffer.
""",
    "hf_llava_next": _transformers_usage("LLaVA-NeXT", "LlavaNext") + "\n",
    "yi_vl_hf": """\
This is Yi-VL as LLaMA-Factory takes it, transformers' LLaVA with LayerNorms in its projector:

    llamafactory-cli chat --model_name_or_path {to_word} --template yi_vl

transformers alone does not know the LayerNorms. vlbench reads it too:

    python -m vlbench chat {model_word}
""",
    "vlbench": """\
This is a checkpoint of vlbench, with every weight, and stands alone:

    python -m vlbench chat {model_word}
    {again}
""",
}


def render_model_card(
    vlm: LoadedVLM,
    training: str,
    next_command: str,
    layout: str,
    export_folder: Path,
    source: Path,
    results: Mapping[str, Any],
) -> str:
    """Return the text of README.md for an export of `vlm` from `source` to a folder.

    Args:
        vlm: The model.
        training: How it was trained, as `describe_training` tells it.
        next_command: The command that trains on, as `training_command` has it.
        layout: The format of the export.
        export_folder: Where the files are.
        source: What was exported.
        results: Those of the run; may be empty.
    """
    rows = [
        f"| {name} | {_plain_markdown(what)} | {sum(p.numel() for p in module.parameters()):,} |"
        for (name, module), what in zip(vlm.model.named_parts(), _describe_parts(vlm), strict=True)
    ]
    paragraphs = [
        "---\n"
        f"library_name: {'transformers' if layout in TRANSFORMERS_LAYOUTS else 'vlbench'}\n"
        "pipeline_tag: image-text-to-text\n"
        f"tags: [vision-language, vlbench, {layout}]\n"
        "---",
        f"# {_plain_markdown(export_folder.name)}",
        f"A vision-language model, written by vlbench {__version__} from "
        f"`{markdown_text(source.name)}`.",
        "\n".join(["| part | what | parameters |", "|---|---|---|", *rows]),
        f"{_describe_images(vlm, layout)} Conversations are written with the chat template "
        f"{vlm.processor.template.name}.",
        *([f"Note that {lost}."] if (lost := tell_lost_orientation(vlm, layout)) else []),
        "## Training",
        training,
        *_render_results_table(results),
        "## Use",
        USAGE_TEXTS[layout]
        .format(
            to_text=format_json(str(export_folder)),
            to_word=shlex.quote(str(export_folder)),
            model_word=shlex.quote(f"model={export_folder}"),
            stop=vlm.processor.template.stop,
            again=next_command,
        )
        .strip(),
        "## Licence and limits",
        "The weights keep the licences of what they began as (language model, vision encoder) and "
        "of the data they\nlearned from. The model may describe what is not in an image.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def tell_lost_orientation(vlm: LoadedVLM, layout: str) -> str:
    """Return what to do where a layout does not keep that photographs are turned; "" elsewhere."""
    if layout == "vlbench" or not vlm.processor.transform.exif:
        return ""
    return (
        f"the model was trained with data.exif=apply, which format={layout} does not hold: turn "
        "photographs upright first, as PIL.ImageOps.exif_transpose does"
    )


def _describe_images(vlm: LoadedVLM, layout: str) -> str:
    """Return what becomes of an image, and how many tokens it takes."""
    settings, tokens = vlm.processor.view_settings, vlm.connector.tokens_per_image
    text = f"An image is {vlm.processor.transform.describe()}, and takes {tokens} tokens"
    if settings is None:
        return f"{text}."
    text += " a view"
    text += ", less what is padded, and one after each row of them" * settings.has_newline
    limit = settings.max_visual_tokens
    if limit is None:
        return f"{text}."
    if layout == "vlbench":
        return f"{text}; of a conversation at most {limit}, to which tiles are reduced."
    return (
        f"{text}. In training a conversation had at most {limit}, to which tiles were reduced; "
        "transformers reduces none."
    )


def training_command(
    recipe_name: str, size: str, export_folder: Path, connector: Mapping[str, Any], last: StageData
) -> str:
    """Return the command that goes on with the `last` stage, and the options of the connector."""
    words = [
        format_override("recipe", recipe_name),
        format_override("size", size),
        format_override("init", export_folder),
        format_override("only", last.stage_name),
    ]
    words += [format_override(f"connector.{key}", value) for key, value in connector.items()]
    if last.config.train not in RENDERED_SOURCES:
        words += ["data.train=FILE.json", "data.images=FOLDER"]
    return shlex.join(["python", "-m", "vlbench", "fit", *words])


def _describe_parts(vlm: LoadedVLM) -> list[str]:
    config = vlm.language.config
    options = ", ".join(f"{key} {value}" for key, value in vlm.model.connector_options.items())
    encoders = [
        f"ViT, {len(one.blocks())} blocks, {encoder_width(one.visual)} wide; output of block "
        f"{one.layer}"
        for one in vlm.vision.encoders()
    ]
    return [
        *encoders,
        f"{type(vlm.connector).__name__}, {options}" if options else type(vlm.connector).__name__,
        f"{family_label(config)}, {config.num_hidden_layers} layers, {config.hidden_size} wide",
    ]


def describe_training(
    recipe_name: str,
    model: ModelConfig,
    stages: Mapping[str, StageConfig],
    position: RunPosition,
) -> str:
    """Return what a model began with, and what each stage until `position` trained, in Markdown."""
    began = (
        model.init
        or f"{model.vision.weights} (vision encoder), {model.language.weights} (language)"
    )
    name = markdown_text(Path(recipe_name).stem)
    lines = [f"Recipe `{name}`, seed {model.seed}; it began with {_plain_markdown(str(began))}."]
    for name, stage in stages.items():
        budget = f"{stage.steps} steps" if stage.steps is not None else f"{stage.epochs} epochs"
        if name == position.name:  # it may be anywhere in its last stage
            budget = f"{position.step} steps"
        lines.append(
            f"- {name}: {budget} of batch {stage.global_batch_size} at {stage.image_size} pixels, "
            f"trains {', '.join(stage.trained_parts)}"
        )
        if name == position.name:
            break
    return "\n".join(lines)


def _render_results_table(results: Mapping[str, Any]) -> list[str]:
    """Return the figures of a finished run as a table, [] when there are none."""
    names = ("accuracy", "unseen_accuracy", "blank_accuracy", "shuffled_accuracy")
    rows = [f"| {name} | {results[name]:.3f} |" for name in names if results.get(name) is not None]
    if not rows:
        return []
    asked_of = _plain_markdown(str(results.get("asked_of")))
    head = f"Exact match on {results.get('questions')} questions ({asked_of}):"
    return [head, "\n".join(["| figure | value |", "|---|---|", *rows])]


def _plain_markdown(text: str) -> str:
    """Return a text of which nothing is a link, an image, an HTML tag or code."""
    return markdown_text(text).replace("[", "\\[")  # tags and code are escaped by then
