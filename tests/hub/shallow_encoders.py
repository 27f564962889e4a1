"""The real architectures of open_clip with two blocks, so that a test can hold their weights.

Widths, heads, patches and names stay. In this process `shallow_encoders()` does it while its
context lasts; in others Python does it as it starts, when `shallow_environment()` is given to them.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

BLOCKS = 2
WORDS = 100  # of the text side, which is never used
FACTORY, ADAPTER = "open_clip.factory", "open_clip.timm_model"
SITE = Path(__file__).parent / "site"


def shallow_configs(configs: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return open_clip's table of architectures with few blocks, and a text side that is small."""
    found = deepcopy(dict(configs))
    for config in found.values():
        if isinstance(config["vision_cfg"].get("layers"), int):
            config["vision_cfg"]["layers"] = BLOCKS
        if "layers" in config["text_cfg"]:
            config["text_cfg"] |= {"layers": 1, "vocab_size": WORDS, "width": 64, "heads": 1}
    return found


def shallow_timm(timm: Any) -> SimpleNamespace:
    """Return timm as open_clip uses it, building its ViTs and EVAs with few blocks."""

    def create_model(name: str, **options: Any) -> Any:
        few = {"depth": BLOCKS} if name.startswith(("vit_", "eva")) else {}
        return timm.create_model(name, **few | options)

    return SimpleNamespace(create_model=create_model)


@contextmanager
def shallow_encoders() -> Iterator[None]:
    """Build every encoder of open_clip two blocks deep while the context lasts."""
    import open_clip.factory as factory
    import open_clip.timm_model as adapter

    configs, timm = factory._MODEL_CONFIGS, adapter.timm
    factory._MODEL_CONFIGS, adapter.timm = shallow_configs(configs), shallow_timm(timm)
    try:
        yield
    finally:
        factory._MODEL_CONFIGS, adapter.timm = configs, timm


def shallow_environment() -> dict[str, str]:
    """Return the environment of a process in which encoders are shallow from its start."""
    paths = [str(SITE), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def install_finder() -> None:
    """Make the encoders of this process shallow as soon as open_clip is imported."""
    sys.meta_path.insert(0, _ShallowFinder())


class _ShallowFinder(importlib.abc.MetaPathFinder):
    """Finds the two modules of open_clip that know how deep encoders are."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if name in (FACTORY, ADAPTER) and spec and spec.loader:
            spec.loader = _ShallowLoader(spec.loader)
            return spec
        return None


class _ShallowLoader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        changed: Any = module
        if module.__name__ == FACTORY:
            changed._MODEL_CONFIGS = shallow_configs(changed._MODEL_CONFIGS)
        else:
            changed.timm = shallow_timm(changed.timm)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
