"""lmms-eval with a model of vlbench: `lmms-eval --model vlbench --model_args model=PATH`.

An extra: `pip install 'vlbench[lmms]'`. lmms-eval finds `manifest` by the entry point in
pyproject.toml. A question is asked as in `protocol=lmms`: the pictures, then the text.
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
from vlbench.errors import UserError, suggest_name
from vlbench.evaluate.tasks.benchmark_types import BenchmarkPrompt
from vlbench.load_model import load_model
from vlbench.model.generation.chat_messages import InMemoryImage, collate_prompts, encode_prompt
from vlbench.model.generation.generate import decode_answer

MAX_NEW_TOKENS = 1024  # where a task names no number, as for lmms-eval's own models
AUTO_BATCH_SIZE = 16  # questions at once for batch_size=auto, as for `eval`
MAX_SHOWN_SKIPPED = 5
MODEL_ARGS = ("model", "pretrained", "dtype", "template", "batch_size")
USED_OPTIONS = {"until", "max_new_tokens", "num_beams", "do_sample", "temperature", "top_p"}


def manifest() -> Any:
    """Return what lmms-eval needs to know to find the class below."""
    from lmms_eval.models.registry_v2 import ModelManifest  # which calls this when it is imported

    return ModelManifest("vlbench", simple_class_path=f"{__name__}.VlbenchModel")


class VlbenchModel(lmms):  # type: ignore[misc]
    """A run, a checkpoint or a released model of vlbench, as lmms-eval asks it."""

    is_simple = True

    def __init__(
        self,
        model: str | None = None,
        dtype: str | None = None,
        batch_size: int | str | None = 1,
        template: str | None = None,
        pretrained: str | None = None,
        **others: Any,
    ) -> None:
        """Load a model, on the GPU if there is one.

        Args:
            model: A run, a checkpoint or a released model.
            dtype: Type of the weights; see `load_model`.
            batch_size: Questions answered at once; "auto" is AUTO_BATCH_SIZE.
            template: Chat template; see `load_model`.
            pretrained: What lmms-eval's own models call `model`.
            others: `device` and `max_batch_size`, which lmms-eval adds and which change nothing.
        """
        super().__init__()
        path = _require_one_path({"model": model, "pretrained": pretrained})
        unknown = sorted(set(others) - {"device", "max_batch_size"})
        if unknown:
            meant = "model" if unknown[0] in ("run", "path") else unknown[0]
            near = suggest_name(meant, MODEL_ARGS)
            takes = ", ".join(MODEL_ARGS)
            raise UserError(f"model_args has {', '.join(unknown)}; vlbench takes {takes}.{near}")
        self.answer_batch_size = _parse_batch_size(batch_size)
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self.device = self.accelerator.device
        self.vlm = load_model(path, dtype, self.device, template)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the answer to each request, in their order; longest prompts come first.

        What cannot be asked (a video, a picture that the data do not have, a text that is too long)
        is answered with nothing, which no task takes for right, counted, and named.
        """
        answers = [""] * len(requests)
        lengths: dict[int, int] = {}
        samples: dict[int, Sample] = {}
        skipped = []
        for number, request in enumerate(requests):
            try:
                sample = self._build_sample(request)
                for picture in sample.images:
                    picture.open()
                lengths[number] = len(encode_prompt(self.vlm, sample))
                samples[number] = sample
            except UserError as mistake:
                skipped.append(f"{request.args[4]} {request.args[3]}: {mistake}")
        order = sorted(
            lengths, key=lambda number: (_limits_key(requests[number]), -lengths[number])
        )
        bar = tqdm(total=len(order), desc="vlbench", disable=self._rank != 0)
        for some in self._group_batches(order, requests):
            given = requests[some[0]].args[1]
            new = self.vlm.generate(
                collate_prompts(self.vlm, [samples[number] for number in some]),
                **_generation_options(given),
            )
            for number, ids in zip(some, new, strict=True):
                answers[number] = _cut_at_stops(decode_answer(self.vlm, ids), given.get("until"))
            bar.update(len(some))
        bar.close()
        _print_unused_options(requests)
        if skipped:
            shown = "\n".join(skipped[:MAX_SHOWN_SKIPPED])
            print(f"vlbench: {len(skipped)} of {len(requests)} questions not asked:\n{shown}")
        return answers

    def _build_sample(self, request: Instance) -> Sample:
        text, _, pictures_of, document, task, split = request.args
        try:
            shown = pictures_of(self.task_dict[task][split][document])
        except Exception as error:  # of the task's own code, whatever it meets in its data
            name = type(error).__name__
            raise UserError(f"its pictures cannot be had ({name}: {error})") from error
        shown = [] if shown is None else shown
        shown = list(shown) if isinstance(shown, list | tuple) else [shown]
        other = [one for one in shown if not isinstance(one, Image.Image)]
        if other:
            raise UserError(
                f"has {type(other[0]).__name__} beside its text; vlbench reads pictures"
            )
        pictures = tuple(
            InMemoryImage(picture, f"{task} {document}: picture {number}")
            for number, picture in enumerate(shown, 1)
        )
        return Sample(f"{task}/{document}", (BenchmarkPrompt(text, pictures).user_turn,), pictures)

    def _group_batches(self, order: Sequence[int], requests: Sequence[Instance]) -> list[list[int]]:
        """Group requests in their order; those of one batch are answered under the same limits."""
        batches: list[list[int]] = []
        for number in order:
            last = batches[-1] if batches else []
            same = last and _limits_key(requests[last[0]]) == _limits_key(requests[number])
            if same and len(last) < self.answer_batch_size:
                last.append(number)
            else:
                batches.append([number])
        return batches

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: a task that compares likelihoods says so in its file (`multiple_choice`)."""
        raise UserError(
            "vlbench answers in words: tasks of `output_type: generate_until` can be run"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse tasks of several rounds."""
        raise UserError("vlbench takes no tasks of several rounds; those of one answer can be run")


def _require_one_path(path_args: dict[str, Any]) -> str:
    """Return the one path of a model that is given; a UserError unless there is exactly one."""
    paths = {key: value for key, value in path_args.items() if value}
    if len(paths) != 1:
        said = f"; given are {' and '.join(paths)}" if paths else ""
        raise UserError(
            "--model_args needs model=PATH (or pretrained=): a run, a checkpoint or a released "
            f"model{said}"
        )
    return str(*paths.values())


def _parse_batch_size(size: int | str | None) -> int:
    """Return how many questions are answered at once; auto, with or without a number, is AUTO."""
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
    """Return a task's generation options as `generate` takes them; a search over beams it refuses.

    A temperature counts where the task samples, as for lmms-eval's own models.
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
    """Name the generation options of tasks that change nothing here."""
    unused = sorted({key for one in requests for key in one.args[1]} - USED_OPTIONS)
    if unused:
        print(f"vlbench: generation options that are not used: {', '.join(unused)}")


def _limits_key(request: Instance) -> str:
    return repr(sorted(request.args[1].items(), key=str))


def _cut_at_stops(text: str, until: str | list[str] | None) -> str:
    for stop in [until] if isinstance(until, str) else until or []:
        text = text.split(stop)[0] if stop else text
    return text.strip()
