"""`lmms-eval --model vlbench --model_args model=PATH`: lmms-eval's tasks on a run or a release.

An extra: `pip install '.[lmms]'`. lmms-eval finds `manifest` by the entry point in
pyproject.toml. A question is asked as in `protocol=lmms`: the images, then the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from vlbench.data.sample import Sample
from vlbench.errors import UserError, escape_to_one_line, suggest_name
from vlbench.evaluate.batch_inference import answer_batch
from vlbench.evaluate.tasks.benchmark_types import BenchmarkPrompt
from vlbench.load_model import load_model
from vlbench.processor import InMemoryImage

MAX_NEW_TOKENS = 1024  # where a task gives no number, as for lmms-eval's own models
AUTO_BATCH_SIZE = 16  # questions per batch for batch_size=auto, as for `eval`
MAX_SHOWN_SKIPPED = 5
MODEL_ARGS = ("model", "pretrained", "dtype", "template", "batch_size")
USED_OPTIONS = {"until", "max_new_tokens", "num_beams", "do_sample", "temperature", "top_p"}


def manifest() -> Any:
    """Return lmms-eval's description of the class below."""
    from lmms_eval.models.registry_v2 import ModelManifest  # circular: it calls this on import

    return ModelManifest("vlbench", simple_class_path=f"{__name__}.VlbenchModel")


class VlbenchModel(lmms):  # type: ignore[misc]
    """A run, a checkpoint or a released model of vlbench, as a model of lmms-eval."""

    is_simple = True

    def __init__(
        self,
        model: str | None = None,
        pretrained: str | None = None,
        dtype: str | None = None,
        batch_size: int | str | None = 1,
        template: str | None = None,
        **others: Any,
    ) -> None:
        """Load a model, on the GPU if there is one.

        Args:
            model: A run, a checkpoint or a released model.
            pretrained: lmms-eval's usual name for `model`.
            dtype: A name of `load_model.DTYPE_NAMES`; None: as the weights are stored.
            batch_size: Questions per batch; auto is AUTO_BATCH_SIZE.
            template: A name of `data.chat_template.CHAT_TEMPLATES`; None: the model's own.
            others: `device` and `max_batch_size`, which lmms-eval adds and are ignored.
        """
        super().__init__()
        path = _require_one_path({"model": model, "pretrained": pretrained})
        unknown = sorted(set(others) - {"device", "max_batch_size"})
        if unknown:
            meant = "model" if unknown[0] in ("run", "path") else unknown[0]
            near = suggest_name(meant, MODEL_ARGS)
            allowed = ", ".join(MODEL_ARGS)
            raise UserError(f"model_args has {', '.join(unknown)}; vlbench takes {allowed}.{near}")
        self.answer_batch_size = _parse_batch_size(batch_size)
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self.device = self.accelerator.device
        self.vlm = load_model(path, dtype, self.device, template)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the answer to each request, in their order; longest prompts are asked first.

        A question that cannot be asked (a video, an image that the data do not have, a text that is
        too long) gets an empty answer, wrong, or drawn at random where a task draws (MMMU);
        it is counted and printed.
        """
        answers = [""] * len(requests)
        prompt_lengths: dict[int, int] = {}
        samples: dict[int, Sample] = {}
        skipped = []
        for index, request in enumerate(requests):
            try:
                sample = self._build_sample(request)
                for image in sample.images:
                    image.open()
                prompt_lengths[index] = len(self.vlm.processor.encode_prompt(sample))
                samples[index] = sample
            except UserError as error:
                skipped.append(f"{request.args[4]} {request.args[3]}: {error}")
        order = sorted(
            prompt_lengths,
            key=lambda index: (_options_key(requests[index]), -prompt_lengths[index]),
        )
        bar = tqdm(total=len(order), desc="vlbench", disable=self._rank != 0)
        for indices in self._group_batches(order, requests):
            task_options = requests[indices[0]].args[1]
            texts = answer_batch(
                self.vlm,
                [samples[index] for index in indices],
                seed=indices[0],  # batches that sample draw numbers of their own, and the same ones
                **_generation_options(task_options),
            )
            for index, text in zip(indices, texts, strict=True):
                answers[index] = _cut_at_stops(text, task_options.get("until"))
            bar.update(len(indices))
        bar.close()
        _print_unused_options(requests)
        if skipped:
            shown = "\n".join(map(escape_to_one_line, skipped[:MAX_SHOWN_SKIPPED]))
            print(f"vlbench: {len(skipped)} of {len(requests)} questions not asked:\n{shown}")
        return answers

    def _build_sample(self, request: Instance) -> Sample:
        text, _, images_of, document, task, split = request.args
        try:
            visuals = images_of(self.task_dict[task][split][document])
        except Exception as error:  # of the task's own code, whatever its data raise
            name = type(error).__name__
            raise UserError(f"its images cannot be had ({name}: {error})") from error
        visuals = [] if visuals is None else visuals
        visuals = list(visuals) if isinstance(visuals, list | tuple) else [visuals]
        others = [visual for visual in visuals if not isinstance(visual, Image.Image)]
        if others:
            raise UserError(f"has {type(others[0]).__name__} beside its text; vlbench reads images")
        images = tuple(
            InMemoryImage(image, f"{task} {document}: image {number}")
            for number, image in enumerate(visuals, 1)
        )
        return Sample(f"{task}/{document}", (BenchmarkPrompt(text, images).user_turn,), images)

    def _group_batches(self, order: Sequence[int], requests: Sequence[Instance]) -> list[list[int]]:
        """Group requests in their order; those of one batch have the same generation options."""
        batches: list[list[int]] = []
        for index in order:
            last = batches[-1] if batches else []
            is_same = last and _options_key(requests[last[0]]) == _options_key(requests[index])
            if is_same and len(last) < self.answer_batch_size:
                last.append(index)
            else:
                batches.append([index])
        return batches

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Raise a UserError: tasks that compare likelihoods (`multiple_choice`) cannot be run."""
        raise UserError("vlbench generates text: tasks of `output_type: generate_until` can be run")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raise a UserError: tasks of several rounds cannot be run."""
        raise UserError("vlbench takes no tasks of several rounds; those of one answer can be run")


def _require_one_path(path_args: dict[str, Any]) -> str:
    """Return the one path of a model among the arguments, or raise a UserError."""
    paths = {key: value for key, value in path_args.items() if value}
    if len(paths) != 1:
        given = f"; given are {' and '.join(paths)}" if paths else ""
        raise UserError(
            "--model_args needs model=PATH (or pretrained=): a run, a checkpoint or a released "
            f"model{given}"
        )
    return str(*paths.values())


def _parse_batch_size(size: int | str | None) -> int:
    """Return the questions per batch; auto, also with a number, is AUTO_BATCH_SIZE."""
    text = str(1 if size is None else size)
    if re.fullmatch(r"auto(:[\d.]+)?", text):
        return AUTO_BATCH_SIZE
    if not text.isdecimal() or int(text) < 1:
        raise UserError(
            f"batch_size is '{text}'; allowed are whole numbers from 1, and auto "
            f"({AUTO_BATCH_SIZE})"
        )
    return int(text)


def _generation_options(task_options: dict[str, Any]) -> dict[str, Any]:
    """Return a task's generation options as those of `generate`, which refuses beam search.

    A temperature applies where the task samples, as for lmms-eval's own models.
    """
    options: dict[str, Any] = {
        "max_new_tokens": int(task_options.get("max_new_tokens") or MAX_NEW_TOKENS)
    }
    if int(task_options.get("num_beams") or 1) > 1:
        options["num_beams"] = int(task_options["num_beams"])
    temperature = float(task_options.get("temperature") or 0)
    if task_options.get("do_sample", temperature > 0) and temperature > 0:
        options |= {"temperature": temperature, "top_p": float(task_options.get("top_p") or 1)}
    return options


def _print_unused_options(requests: Sequence[Instance]) -> None:
    """Print the generation options of tasks that have no effect here."""
    unused = sorted({key for request in requests for key in request.args[1]} - USED_OPTIONS)
    if unused:
        names = escape_to_one_line(", ".join(unused))
        print(f"vlbench: generation options that are not used: {names}")


def _options_key(request: Instance) -> str:
    return repr(sorted(request.args[1].items(), key=str))


def _cut_at_stops(text: str, until: str | list[str] | None) -> str:
    for stop in [until] if isinstance(until, str) else until or []:
        text = text.split(stop)[0] if stop else text
    return text.strip()
