"""Weights of a connector from files in the layout of its reference implementation.

Every tensor of the files is loaded, or belongs to another part of the reference and is counted, or
is refused. What the connector has and the files lack is named.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vlbench.connector import registry
from vlbench.connector.base import Connector
from vlbench.errors import EnvironmentFailure, UserError, one_line, suggest_name
from vlbench.model.weights.tensor_files import (
    TensorHeader,
    check_weight_dtype,
    read_tensor_headers,
    read_tensors,
)
from vlbench.model.weights.tensor_groups import summarize_tensor_names
from vlbench.state_dicts import WeightMismatch
from vlbench.text_tables import list_some

PEFT_PREFIX = "base_model.model."
WRAPPER_PREFIXES = ("module.", "_forward_module.", "_orig_mod.", PEFT_PREFIX)
"""Prefixes that DDP, DeepSpeed, Lightning, torch.compile and peft put before every name."""
LORA_NAME_PATTERN = re.compile(
    r".*\.(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|base_layer)(\..*)?"
)
"""Names of tensors of peft's LoRA."""


class ReferenceWeights(Mapping[str, Tensor]):
    """The tensors of several files by name, each read when it is looked up.

    A wrapper's prefix before all names is left out. `used_names` are those that were looked up;
    `trained_with_lora` tells whether peft wrote the names.
    """

    def __init__(self, files: Sequence[Path], on_meta: bool = False) -> None:
        """Read names and shapes in `files`; with `on_meta` tensors have no values."""
        self._locations: dict[str, tuple[Path, TensorHeader]] = {}
        for file in files:
            for name, header in read_tensor_headers(file).items():
                if name in self._locations:
                    raise UserError(f"{file}: tensor {name} is also in {self._locations[name][0]}")
                self._locations[name] = (file, header)
        self._refuse_lora_adapters(files)
        self._original_names = _strip_wrapper_prefixes(self._locations)
        self._on_meta = on_meta
        self.trained_with_lora = any(PEFT_PREFIX in name for name in self._locations)
        self.used_names: set[str] = set()

    def _refuse_lora_adapters(self, files: Sequence[Path]) -> None:
        adapted = [name for name in self._locations if LORA_NAME_PATTERN.fullmatch(name)]
        if adapted:
            raise UserError(
                f"{files[0]} holds LoRA adapters ({adapted[0]}, ...), which change a language "
                "model and are no connector: merge them into the model that they were trained on, "
                "and give the merged folder. What LLaVA trained beside them (the projector) is in "
                "non_lora_trainables.bin"
            )

    def __getitem__(self, name: str) -> Tensor:
        given = self._original_names[name]
        file, header = self._locations[given]
        check_weight_dtype(given, header, file)
        self.used_names.add(name)
        if self._on_meta:
            return torch.empty(header.shape, device="meta")
        return next(read_tensors(file, [given]))[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._original_names)

    def __len__(self) -> int:
        return len(self._original_names)

    def summarize_unused(self) -> str:
        """Return which tensors were not used, as "vision_model (402), language_model (290)"."""
        return summarize_tensor_names(name for name in self if name not in self.used_names)


def load_reference_weights(
    connector: Connector, weights: ReferenceWeights, connector_name: str, context: str
) -> str:
    """Load `weights` into a connector; return a summary of what was loaded and what was not.

    Raises:
        UserError: begins with `context`; when the connector takes no weights, or they do not fit.
    """
    try:
        loaded = connector.load_reference(weights)
    except NotImplementedError as error:
        raise UserError(
            f"{context}: connector {connector_name} takes no file of weights"
        ) from error
    except (UserError, EnvironmentFailure) as error:
        if isinstance(error, WeightMismatch):
            raise UserError(f"{context} does not fit: {error}") from error
        raise
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{context} does not fit: {one_line(error)}") from error
    except Exception as error:
        registry.blame_connector_file(error)
        raise
    own = set(connector.state_dict())
    _check_reference_loaded(
        connector, weights, loaded, own, f"{context}: connector {connector_name}"
    )
    return summarize_loading(loaded, own, weights)


def summarize_loading(
    loaded_names: Collection[str], expected_names: Collection[str], weights: ReferenceWeights
) -> str:
    """Return how many expected tensors were loaded, which were not, and what was left out."""
    text = f"{len(loaded_names)} tensors"
    missing = sorted(set(expected_names) - set(loaded_names))
    if missing:
        text += f"; not in it, so as it began: {list_some(missing, 3)}"
    text += f"; left out: {weights.summarize_unused()}" if weights.summarize_unused() else ""
    if weights.trained_with_lora:  # LLaVA's non_lora_trainables.bin
        text += "; trained beside LoRA adapters, which are not in it"
    return text


def _check_reference_loaded(
    connector: Connector,
    weights: ReferenceWeights,
    loaded_names: object,
    expected_names: set[str],
    context: str,
) -> None:
    """Compare the names that a connector returned with its tensors, and with the names it used."""
    if not isinstance(loaded_names, Collection) or not set(loaded_names) <= expected_names:
        raise UserError(
            f"{context}: load_reference returned {loaded_names!r:.80}; wanted are the names of its "
            "tensors that were loaded, as load_strict returns them"
        )
    for name in weights:
        if name not in weights.used_names and not re.fullmatch(
            connector.ignored_reference_keys, name
        ):
            suggestion = suggest_name(name, weights.used_names)
            raise UserError(f"{context} has no use for tensor {name} of the weights.{suggestion}")


def _strip_wrapper_prefixes(names: Iterable[str]) -> dict[str, str]:
    """Return the names without prefixes that all of them have -> the names as they are."""
    originals = {name: name for name in names}
    while originals:
        prefix = next((p for p in WRAPPER_PREFIXES if all(n.startswith(p) for n in originals)), "")
        if not prefix:
            break
        originals = {name.removeprefix(prefix): given for name, given in originals.items()}
    return originals
