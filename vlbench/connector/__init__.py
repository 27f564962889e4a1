"""Connectors: the contract, the registry of names, and the schema of a connector's options.

A connector's file needs `from vlbench.connector import Connector, Shapes`. These names are imported
on first use, because `registry` and `option_schema` work without torch. Connectors outside of
vlbench are modules below this one: whichever process looks for one finds it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from vlbench.connector.folder_modules import FolderFinder

if TYPE_CHECKING:
    from vlbench.connector.base import Connector, ImagePlaces, Shapes, zero_like_loss
    from vlbench.connector.question import Question

__all__ = ["Connector", "ImagePlaces", "Question", "Shapes", "zero_like_loss"]

sys.meta_path.insert(0, FolderFinder())  # it answers for names below this package alone


def __getattr__(name: str) -> object:
    """Return `name` of `vlbench.connector.base` or `vlbench.connector.question`."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vlbench.connector import base, question

    return getattr(question if name == "Question" else base, name)
