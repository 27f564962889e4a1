"""`lmms-eval --model vlbench --model_args run=PATH`: the tasks of lmms-eval on a run or a release.

An extra: `pip install 'vlbench[lmms]'`. lmms-eval finds `manifest` by the entry point in
pyproject.toml. A question is asked as in `protocol=lmms`: the pictures, then the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from vlbench.data.sample import Sample
from vlbench.evaluate.tasks.record import Prompt
from vlbench.mistakes import Mistake
from vlbench.model.generate import answer_text
from vlbench.model.messages import Opened, prompt_batch, prompt_ids
from vlbench.serve.load import load

MAX_NEW_TOKENS = 1024  # where a task names no number, as for lmms-eval's own models
SKIPPED_SHOWN = 5


def manifest() -> Any:
    """Return what lmms-eval needs to know to find the class below."""
    from lmms_eval.models.registry_v2 import ModelManifest  # which calls this when it is imported

    return ModelManifest("vlbench", simple_class_path=f"{__name__}.VlbenchModel")


class VlbenchModel(lmms):  # type: ignore[misc]
    """A run, a checkpoint or a released model of vlbench, as lmms-eval asks it."""

    is_simple = True

    def __init__(
        self, run: str, dtype: str | None = None, batch_size: int | str = 1, **others: Any
    ) -> None:
        """Load `run`; `batch_size` questions are answered at once, on the GPU if there is one.

        lmms-eval itself adds `device` and `max_batch_size`, which say nothing more here.
        """
        super().__init__()
        unknown = sorted(set(others) - {"device", "max_batch_size"})
        if unknown:
            raise Mistake(f"model_args has {', '.join(unknown)}; vlbench takes run and dtype")
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self.device = self.accelerator.device
        self.batch = max(1, int(batch_size))
        self.vlm = load(run, dtype, self.device)

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
                samples[number] = self._sample(request)
                lengths[number] = len(prompt_ids(self.vlm, samples[number]))
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
        if skipped:
            shown = "\n".join(skipped[:SKIPPED_SHOWN])
            print(f"vlbench: {len(skipped)} of {len(requests)} questions not asked:\n{shown}")
        return answers

    def _sample(self, request: Instance) -> Sample:
        text, _, pictures_of, document, task, split = request.args
        try:
            shown = pictures_of(self.task_dict[task][split][document]) or []
        except Exception as error:  # of the task's own code, whatever it meets in its data
            name = type(error).__name__
            raise Mistake(f"its pictures cannot be had ({name}: {error})") from error
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


def _limits(request: Instance) -> str:
    return repr(sorted(request.args[1].items(), key=str))


def _cut(text: str, until: str | list[str] | None) -> str:
    for stop in [until] if isinstance(until, str) else until or []:
        text = text.split(stop)[0] if stop else text
    return text.strip()
