"""A program that uses vlbench and looks at the settings of its process after each step.

    python tests/host_program.py CHECKPOINT FOLDER heavy|light|cold

The last line it prints is JSON: for each step the names of the settings that it changed. `heavy`
imports the libraries first and so can look at their settings too, `cold` does nothing but train.
"""

from __future__ import annotations

import gc
import json
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

NUMBERS = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})


def process_settings() -> dict[str, Any]:
    """Return the settings of the process by name: of Python, and of libraries that are there."""
    root = logging.getLogger()
    found: dict[str, Any] = {
        "root level": root.level,
        "root handlers": [(id(one), one.level) for one in root.handlers],
        "root filters": list(root.filters),
        "logging disabled": root.manager.disable,
        "logger class": logging.getLoggerClass(),
        "loggers": {
            name: (one.level, [id(h) for h in one.handlers], one.propagate, one.disabled)
            for name, one in root.manager.loggerDict.items()
            if isinstance(one, logging.Logger)
        },
        "warnings": list(warnings.filters),
        "showwarning": (warnings.showwarning, warnings.formatwarning),
        "environment": dict(os.environ),
        "signals": {int(number): signal.getsignal(number) for number in NUMBERS},
        "hooks": (sys.excepthook, sys.displayhook, threading.excepthook, sys.unraisablehook),
        "sys.path": list(sys.path),
        "streams": [(one, one.errors, one.encoding) for one in (sys.stdout, sys.stderr)],
        "recursion": sys.getrecursionlimit(),
        "folder": os.getcwd(),
        "locale": locale.setlocale(locale.LC_ALL),
        "garbage": (gc.isenabled(), gc.get_threshold()),
        "random": random.getstate(),
        "threads": [t.name for t in threading.enumerate() if not t.daemon],
    }
    for library, look in LIBRARIES.items():
        if library in sys.modules:
            found |= look(sys.modules[library])
    return found


def torch_settings(torch: Any) -> dict[str, Any]:
    backends = torch.backends
    found = {
        "torch random": torch.get_rng_state().tolist(),
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch types": (torch.get_default_dtype(), torch.get_default_device()),
        "torch products": (
            torch.get_float32_matmul_precision(),
            backends.cuda.matmul.allow_tf32,
            backends.cudnn.allow_tf32,
        ),
        "torch determinism": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            backends.cudnn.deterministic,
            backends.cudnn.benchmark,
            backends.cudnn.enabled,
        ),
        "torch attention": (
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.math_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
        ),
        "torch modes": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_anomaly_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
        ),
        "torch processes": (
            torch.multiprocessing.get_start_method(allow_none=True),
            torch.multiprocessing.get_sharing_strategy(),
        ),
        "torch printing": str(torch._tensor_str.PRINT_OPTS),
    }
    if "torch._dynamo.config" in sys.modules:
        found["dynamo"] = sys.modules["torch._dynamo.config"].get_config_copy()
    return found


def transformers_settings(transformers: Any) -> dict[str, Any]:
    from huggingface_hub.utils import are_progress_bars_disabled

    told = transformers.utils.logging
    return {
        "transformers": (told.get_verbosity(), told.is_progress_bar_enabled()),
        "hub": are_progress_bars_disabled(),
    }


def numpy_settings(numpy: Any) -> dict[str, Any]:
    kind, keys, *rest = numpy.random.get_state()
    return {"numpy": (kind, keys.tolist(), *rest, numpy.geterr(), numpy.get_printoptions())}


def matplotlib_settings(matplotlib: Any) -> dict[str, Any]:
    return {"matplotlib": {k: str(dict.__getitem__(matplotlib.rcParams, k)) for k in KEYS}}


def pillow_settings(image: Any) -> dict[str, Any]:
    return {"images": (image.MAX_IMAGE_PIXELS, image.core.get_alignment())}


RECIPE = ["recipe=yivl_llava", "log.questions=2", "log.examples=0", "log.evaluate_every=1"]
RECIPE += ["stages.align_224.steps=2", "stages.align_448.steps=0", "stages.chat.steps=1"]
RECIPE += ["stages.align_224.global_batch_size=2", "stages.chat.global_batch_size=2"]
KEYS = ("backend", "interactive", "font.size", "axes.grid", "svg.hashsalt")
LIBRARIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "torch": torch_settings,
    "numpy": numpy_settings,
    "transformers": transformers_settings,
    "matplotlib": matplotlib_settings,
    "PIL.Image": pillow_settings,
}


def changed_settings(before: dict[str, Any]) -> list[str]:
    """Return the names of settings that were there before and are others now."""
    now = process_settings()
    if "loggers" in before:  # those of libraries that were imported since are new, not changed
        now["loggers"] = {n: one for n, one in now["loggers"].items() if n in before["loggers"]}
    return [name for name in before if now.get(name) != before[name]]


def run_program(checkpoint: str, folder: str, import_mode: str) -> dict[str, list[str]]:
    """Use vlbench step by step; return what each step changed."""
    changed: dict[str, list[str]] = {}
    before = process_settings()

    def record_changes(step: str) -> None:
        nonlocal before
        changed[step] = changed_settings(before)
        before = process_settings()

    import vlbench

    record_changes("import")
    if import_mode == "heavy":
        import lightning.pytorch  # noqa: F401
        import matplotlib  # noqa: F401
        import open_clip  # noqa: F401
        import torch._dynamo  # noqa: F401
        import transformers  # noqa: F401
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401

        import vlbench.__main__
        import vlbench.fit_command

        before = process_settings()
    if import_mode == "cold":
        from vlbench.__main__ import main

        assert main(["fit", *RECIPE, f"run={folder}/run"]) == 0
        record_changes("fit")
        refuse_needless_imports()
        return changed
    talk = [{"role": "user", "content": "What is this?"}]
    vlm = vlbench.load(checkpoint)
    record_changes("load")
    vlm.chat(talk, max_new_tokens=3)
    record_changes("chat")
    vlm.generate(vlm.prepare([talk, talk]), max_new_tokens=3, temperature=1.0, seed=4)
    record_changes("generate")
    if import_mode == "heavy":
        run_commands(vlbench, checkpoint, folder, record_changes)
    else:
        refuse_needless_imports()
    return changed


def refuse_needless_imports() -> None:
    """Fail where a library was imported that only other recipes and data need."""
    needless = {"peft", "pyarrow", "sklearn", "pandas", "datasets"} & set(sys.modules)
    assert not needless, needless


def run_commands(
    vlbench: Any, checkpoint: str, folder: str, record_changes: Callable[[str], None]
) -> None:
    """Call what the command line calls."""
    from vlbench import fit_command
    from vlbench.config import recipe as recipes

    main = vlbench.__main__.main
    assert main(["chat", f"model={checkpoint}", "question=Hi", "max_new_tokens=3"]) == 0
    record_changes("main")
    assert main(["export", f"model={checkpoint}", f"out={folder}/out", "format=vlbench"]) == 0
    record_changes("export")
    assert (
        fit_command.train_and_evaluate(recipes.load_recipe([*RECIPE, f"run={folder}/run"]))[0] == 0
    )
    record_changes("fit")
    codes: list[int] = []
    recipe = recipes.load_recipe([*RECIPE, "only=chat", f"run={folder}/thread"])
    thread = threading.Thread(
        target=lambda: codes.append(fit_command.train_and_evaluate(recipe)[0])
    )
    thread.start()
    thread.join()
    assert codes == [0]
    record_changes("fit in a thread")
    assert main(["fit", *RECIPE, "data.workers=1", "precision=bf16", f"run={folder}/other"]) == 0
    record_changes("fit with workers")


if __name__ == "__main__":
    print(json.dumps(run_program(*sys.argv[1:])))
