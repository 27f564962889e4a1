"""vlbench: train vision-language models with any connector, and compare connectors fairly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlbench.version import __version__

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    import torch

    from vlbench.model.loaded_vlm import LoadedVLM
    from vlbench.python_fit import TrainedRun

__all__ = ["__version__", "fit", "load"]


def load(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    template: str | None = None,
    trust_connector: bool = False,
) -> LoadedVLM:
    """Load a run, a checkpoint or a released model (a folder or a hub id), ready to answer.

    The model that is returned has `prompt(messages)`, `prepare(messages)`, `features(batch)`,
    `visual(batch)`, `model(batch).logits`, `generate(batch)` and `chat(messages)`; messages are in
    the Hugging Face chat format. `ask(image, question)` gives an answer that a notebook shows with
    its picture. `dtype`, `device`, `template` and `trust_connector`: see
    `vlbench.load_model.load_model`.
    Several threads may use one model at once, and settings of the process stay as they are.
    """
    from vlbench.garbage_collection import pause_garbage_collection  # here: importing is quick
    from vlbench.printable_streams import show_control_characters
    from vlbench.process_settings import preserve_process_settings

    with preserve_process_settings(), show_control_characters():
        with pause_garbage_collection():
            from vlbench.load_model import load_model as load_now  # here: it imports torch

        return load_now(path, dtype, device, template, trust_connector)


def fit(recipe: str | Path, **keys: Any) -> TrainedRun | None:
    """Train a recipe and evaluate it, as `python -m vlbench fit` does; return the finished run.

    `keys` are those of recipes, nested (`stages={"chat": {"steps": 200}}`) or with dots
    (`**{"stages.chat.steps": 200}`); `from_` stands for `from`. The run that is returned has
    `folder` and `results`; it is None after `dry_run=True`. Raises `vlbench.errors.UserError` where
    the command prints a line. Settings of the process (logging, warnings, signals, random numbers)
    are as before when it returns.
    """
    from vlbench.printable_streams import show_control_characters  # here: importing is quick
    from vlbench.process_settings import preserve_process_settings

    with preserve_process_settings(), show_control_characters():
        from vlbench.python_fit import fit_keys  # here: it imports torch in the end

        return fit_keys({"recipe": recipe, **keys})
