"""`huggingface_hub` of this process and of its children, pointed to a hub."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from .server import FakeHub

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def use_hub(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, home: Path) -> Path:
    """Let everything be fetched from `hub` into `home`, without waiting between tries.

    Return the folder of the cache. Processes that are started later do the same, but wait.
    """
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http, disable_progress_bars

    cache = home / "hub"
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    disable_progress_bars()
    at_once: Any = SimpleNamespace(sleep=lambda seconds: None)
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", at_once)
    return cache


def visit_hub(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, folder: Path) -> FakeHub:
    """Return a hub of several tests as if it was new, with `folder` to work and download in."""
    hub.forget()
    use_hub(monkeypatch, hub, folder / "home")
    monkeypatch.chdir(folder)
    return hub


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be fetched, as HF_HUB_OFFLINE=1 does."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
