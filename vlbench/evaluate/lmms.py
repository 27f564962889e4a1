"""`lmms-eval --model vlbench --model_args run=PATH`: the tasks of lmms-eval on a run or a release.

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
from vlbench.evaluate.tasks.record import Prompt
from vlbench.mistakes import Mistake, nearest
from vlbench.model.generate import answer_text
from vlbench.model.messages import Opened, prompt_batch, prompt_ids
from vlbench.serve.load import load

MAX_NEW_TOKENS = 1024  # where a task names no number, as for lmms-eval's own models
AUTO = 16  # questions at once for batch_size=auto, as for `eval`
SKIPPED_SHOWN = 5
ALIASES = ("model", "pretrained")
TAKES = ("run", *ALIASES, "dtype", "template", "batch_size")
USED = {"until", "max_new_tokens", "num_beams", "do_sample", "temperature", "top_p"}


def manifest() -> Any:
    """Return what lmms-eval needs to know to find the class below."""
    from lmms_eval.models.registry_v2 import ModelManifest  # which calls this when it is imported

    return ModelManifest("vlbench", simple_class_path=f"{__name__}.VlbenchModel")


class VlbenchModel(lmms):  # type: ignore[misc]
    """A run, a checkpoint or a released model of vlbench, as lmms-eval asks it."""

    is_simple = True

    def __init__(
        self,
        run: str | None = None,
        dtype: str | None = None,
        batch_size: int | str | None = 1,
        template: str | None = None,
        **others: Any,
    ) -> None:
        """Load `run`; `batch_size` questions are answered at once, on the GPU if there is one.

        `run` is a run, a checkpoint or a released model, and may be called `model` or `pretrained`;
        `batch_size` auto is AUTO. lmms-eval itself adds `device` and `max_batch_size`, which say
        nothing more here.
        """
        super().__init__()
        path = _path_in({"run": run, **{key: others.pop(key, None) for key in ALIASES}})
        unknown = sorted(set(others) - {"device", "max_batch_size"})
        if unknown:
            near = nearest(unknown[0], TAKES)
            takes = ", ".join(TAKES)
            raise Mistake(f"model_args has {', '.join(unknown)}; vlbench takes {takes}.{near}")
        self.batch = _batch(batch_size)
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self.device = self.accelerator.device
        self.vlm = load(path, dtype, self.device, template)

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
                sample = self._sample(request)
                for picture in sample.pictures:
                    picture.open()
                lengths[number] = len(prompt_ids(self.vlm, sample))
                samples[number] = sample
            except Mistake as mistake:
                skipped.append(f"{request.args[4]} {request.args[3]}: {mistake}")
        order = sorted(lengths, key=lambda number: (_limits(requests[number]), -lengths[number]))
        bar = tqdm(total=len(order), desc="vlbench", disable=self._rank != 0)
        for some in self._batches(order, requests):
            given = requests[some[0]].args[1]
            new = self.vlm.generate(
                prompt_batch(self.vlm, [samples[number] for number in some]), **_options(given)
            )
            for number, ids in zip(some, new, strict=True):
                answers[number] = _cut(answer_text(self.vlm, ids), given.get("until"))
            bar.update(len(some))
        bar.close()
        _tell_unused(requests)
        if skipped:
            shown = "\n".join(skipped[:SKIPPED_SHOWN])
            print(f"vlbench: {len(skipped)} of {len(requests)} questions not asked:\n{shown}")
        return answers

    def _sample(self, request: Instance) -> Sample:
        text, _, pictures_of, document, task, split = request.args
        try:
            shown = pictures_of(self.task_dict[task][split][document])
        except Exception as error:  # of the task's own code, whatever it meets in its data
            name = type(error).__name__
            raise Mistake(f"its pictures cannot be had ({name}: {error})") from error
        shown = [] if shown is None else shown
        shown = list(shown) if isinstance(shown, list | tuple) else [shown]
        other = [one for one in shown if not isinstance(one, Image.Image)]
        if other:
            raise Mistake(f"has {type(other[0]).__name__} beside its text; vlbench reads pictures")
        pictures = tuple(
            Opened(picture, f"{task} {document}: picture {number}")
            for number, picture in enumerate(shown, 1)
        )
        return Sample(f"{task}/{document}", (Prompt(text, pictures).turn,), pictures)

    def _batches(self, order: Sequence[int], requests: Sequence[Instance]) -> list[list[int]]:
        """Group requests in their order; those of one batch are answered under the same limits."""
        batches: list[list[int]] = []
        for number in order:
            last = batches[-1] if batches else []
            same = last and _limits(requests[last[0]]) == _limits(requests[number])
            if same and len(last) < self.batch:
                last.append(number)
            else:
                batches.append([number])
        return batches

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: a task that compares likelihoods says so in its file (`multiple_choice`)."""
        raise Mistake("vlbench answers in words: tasks of `output_type: generate_until` can be run")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse tasks of several rounds."""
        raise Mistake("vlbench takes no tasks of several rounds; those of one answer can be run")


def _path_in(given: dict[str, Any]) -> str:
    """Return the one path of a model among `given`; a Mistake unless there is exactly one."""
    paths = {key: value for key, value in given.items() if value}
    if len(paths) != 1:
        said = f"; given are {' and '.join(paths)}" if paths else ""
        raise Mistake(
            "--model_args needs run=PATH (or model=, pretrained=): a run, a checkpoint or a "
            f"released model{said}"
        )
    return str(*paths.values())


def _batch(size: int | str | None) -> int:
    """Return how many questions are answered at once; auto, with or without a number, is AUTO."""
    text = str(1 if size is None else size)
    if re.fullmatch(r"auto(:[\d.]+)?", text):
        return AUTO
    if not text.isdecimal() or int(text) < 1:
        raise Mistake(
            f"batch_size is '{text}'; allowed are whole numbers from 1, and auto ({AUTO})"
        )
    return int(text)


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """Return a task's generation options as `generate` takes them; a search over beams it refuses.

    A temperature counts where the task samples, as for lmms-eval's own models.
    """
    options: dict[str, Any] = {"max_new_tokens": int(given.get("max_new_tokens") or MAX_NEW_TOKENS)}
    if int(given.get("num_beams") or 1) > 1:
        options["num_beams"] = int(given["num_beams"])
    temperature = float(given.get("temperature") or 0)
    if given.get("do_sample", temperature > 0) and temperature > 0:
        options |= {"temperature": temperature, "top_p": float(given.get("top_p") or 1)}
    return options


def _tell_unused(requests: Sequence[Instance]) -> None:
    """Name the generation options of tasks that change nothing here."""
    unused = sorted({key for one in requests for key in one.args[1]} - USED)
    if unused:
        print(f"vlbench: generation options that are not used: {', '.join(unused)}")


def _limits(request: Instance) -> str:
    return repr(sorted(request.args[1].items(), key=str))


def _cut(text: str, until: str | list[str] | None) -> str:
    for stop in [until] if isinstance(until, str) else until or []:
        text = text.split(stop)[0] if stop else text
    return text.strip()
