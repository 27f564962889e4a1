"""Weights of a connector from files in the layout of its reference implementation.

Nothing is dropped in silence: every tensor of the files is loaded, or belongs to another part of
the reference and is counted, or is refused; what the files lack of the connector is named.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vlbench import plugins
from vlbench.connector import Connector
from vlbench.mistakes import Mistake, Trouble, nearest
from vlbench.model.weights.groups import counted
from vlbench.model.weights.shards import Header, check_kind, headers, read

PEFT = "base_model.model."
WRAPPERS = ("module.", "_forward_module.", "_orig_mod.", PEFT)
"""What DDP, DeepSpeed, Lightning, torch.compile and peft put before every name."""
ADAPTER = re.compile(r".*\.(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|base_layer)(\..*)?")
"""Names of peft's LoRA."""


class References(Mapping[str, Tensor]):
    """The tensors of several files by name, each read when it is asked for.

    A wrapper's beginning of all names is no part of them. `taken` are the names asked for;
    `beside_adapters` says that peft wrote the names.
    """

    def __init__(self, files: Sequence[Path], empty: bool = False) -> None:
        """Look at names and shapes in `files`; with `empty` tensors have no numbers (`meta`)."""
        self._places: dict[str, tuple[Path, Header]] = {}
        for file in files:
            for name, header in headers(file).items():
                if name in self._places:
                    raise Mistake(f"{file}: tensor {name} is also in {self._places[name][0]}")
                self._places[name] = (file, header)
        self._refuse_adapters(files)
        self._names = _unwrapped(self._places)
        self._empty = empty
        self.beside_adapters = any(PEFT in name for name in self._places)
        self.taken: set[str] = set()

    def _refuse_adapters(self, files: Sequence[Path]) -> None:
        adapted = [name for name in self._places if ADAPTER.fullmatch(name)]
        if adapted:
            raise Mistake(
                f"{files[0]} holds LoRA adapters ({adapted[0]}, ...), which change a language "
                "model and are no connector: merge them into the model that they were trained on, "
                "and give the merged folder. What LLaVA trained beside them (the projector) is in "
                "non_lora_trainables.bin"
            )

    def __getitem__(self, name: str) -> Tensor:
        given = self._names[name]
        file, header = self._places[given]
        check_kind(given, header, file)
        self.taken.add(name)
        if self._empty:
            return torch.empty(header.shape, device="meta")
        return next(read(file, [given]))[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def left(self) -> str:
        """Return which tensors were not taken, as "vision_model (402), language_model (290)"."""
        return counted(name for name in self if name not in self.taken)


def load_reference(connector: Connector, weights: References, name: str, where: str) -> str:
    """Load `weights` into a connector called `name`; return what was loaded and what was not.

    Raises:
        Mistake: begins with `where`; when the connector takes no weights, or they do not fit.
    """
    try:
        loaded = connector.load_reference(weights)
    except NotImplementedError as error:
        raise Mistake(f"{where}: connector {name} takes no file of weights") from error
    except (Mistake, Trouble):
        raise
    except (ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:400]
        raise Mistake(f"{where} does not fit: {reason}") from error
    except Exception as error:
        plugins.blame(error)
        raise
    own = set(connector.state_dict())
    _check(connector, weights, loaded, own, f"{where}: connector {name}")
    return summary(loaded, own, weights)


def summary(loaded: Collection[str], own: Collection[str], weights: References) -> str:
    """Return how many of the tensors `own` were loaded, which were not, and what was left out."""
    text = f"{len(loaded)} tensors"
    anew = sorted(set(own) - set(loaded))
    if anew:
        more = f" and {len(anew) - 3} more" if len(anew) > 4 else ""
        text += f"; not in it, so as it began: {', '.join(anew[: 3 if more else 4])}{more}"
    text += f"; left out: {weights.left()}" if weights.left() else ""
    beside = weights.beside_adapters  # LLaVA's non_lora_trainables.bin
    return text + ("; trained beside LoRA adapters, which are not in it" if beside else "")


def _check(
    connector: Connector,
    weights: References,
    loaded: object,
    own: set[str],
    where: str,
) -> None:
    """Compare what a connector says it loaded with what it has, and what it took of the files."""
    if not isinstance(loaded, Collection) or not set(loaded) <= own:
        raise Mistake(
            f"{where}: load_reference returned {loaded!r:.80}; it returns the names of its tensors "
            "that were loaded, as load_exactly does"
        )
    for name in weights:
        if name not in weights.taken and not re.fullmatch(connector.reference_others, name):
            close = nearest(name, weights.taken)
            raise Mistake(f"{where} has no use for tensor {name} of the weights.{close}")


def _unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Return names without what wraps all of them -> names as they are."""
    found = {name: name for name in names}
    while found:
        wrapper = next((w for w in WRAPPERS if all(name.startswith(w) for name in found)), None)
        if wrapper is None:
            break
        found = {name.removeprefix(wrapper): given for name, given in found.items()}
    return found
