"""Callbacks of the user: `trainer.callbacks=[module.Class, ...]`, Lightning's own interface."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence

import lightning.pytorch as pl

from vlbench.errors import UserError, one_line, suggest_name

KEY = "trainer.callbacks"


def build_user_callbacks(class_paths: Sequence[str]) -> list[pl.Callback]:
    """Return an instance of each class, made without arguments.

    A class is named as in an import, as `my_callbacks.Printer`; its module is looked for where
    Python looks (the current folder with `python -m vlbench`, installed packages, PYTHONPATH).
    Raises a UserError for one that is missing, is no `lightning.pytorch.Callback`, or fails.
    """
    return [_build_callback(class_path) for class_path in class_paths]


def _build_callback(class_path: str) -> pl.Callback:
    callback_class = _find_class(class_path)
    try:
        return callback_class()
    except Exception as error:
        raise UserError(
            f"{KEY}: {class_path}() fails ({one_line(error)}); a callback is made without arguments"
        ) from error


def _find_class(class_path: str) -> type[pl.Callback]:
    module_name, _, class_name = class_path.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in class_path.split(".")):
        raise UserError(
            f"{KEY} has '{class_path}'; a callback is named as module.Class, as "
            "my_callbacks.Printer for the class Printer of my_callbacks.py"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"{KEY}: module {module_name} of {class_path} cannot be imported ({one_line(error)})"
        ) from error
    callback_class = getattr(module, class_name, None)
    if inspect.isclass(callback_class) and issubclass(callback_class, pl.Callback):
        return callback_class
    offered = [
        name
        for name, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, pl.Callback) and member is not pl.Callback
    ]
    problem = "is missing" if callback_class is None else "is no lightning.pytorch.Callback"
    allowed = f"it has {', '.join(offered)}" if offered else "it has none"
    raise UserError(
        f"{KEY}: {class_name} {problem} in module {module_name}; of callbacks {allowed}."
        f"{suggest_name(class_name, offered)}"
    )
