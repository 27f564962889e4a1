"""vlbench: train vision-language models with any connector, and compare connectors fairly."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlbench.model.vlm import VLM

__version__ = "0.1.0"


def load(path: str) -> VLM:
    """Load a run or a checkpoint, ready to answer: see `VLM.chat`."""
    from vlbench.serve.load import load_run

    return load_run(path)
