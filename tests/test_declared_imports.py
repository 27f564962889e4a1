"""What tests import at their head comes with `pip install 'vlbench[test]'`, on any machine."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TESTS = Path(__file__).parent


def needed_distributions(name: str, extra: str = "") -> set[str]:
    """Return what installing `name[extra]` brings, with the dependencies of dependencies."""
    seen = {(canonicalize_name(name), extra)}
    waiting = list(seen)
    while waiting:
        current, wanted = waiting.pop()
        for text in metadata.requires(current) or ():
            need = Requirement(text)
            if need.marker and not need.marker.evaluate({"extra": wanted}):
                continue
            keys = {(canonicalize_name(need.name), key) for key in {"", *need.extras}}
            waiting += [key for key in keys - seen if is_installed(key[0])]
            seen |= keys
    return {found for found, _ in seen}


def is_installed(name: str) -> bool:
    """Return False for what another platform or version of Python would need."""
    return any(True for _ in metadata.distributions(name=name))


def imports_at_the_head(file: Path) -> Iterator[str]:
    """Yield the top-level packages that importing a module imports."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def test_what_tests_import_is_installed_with_them():
    ours = {"vlbench", "connectors", *(path.stem for path in TESTS.iterdir())}
    brings = needed_distributions("vlbench", "test")
    holders = metadata.packages_distributions()
    missing = {
        f"{file.name}: {name}"
        for file in TESTS.glob("*.py")
        for name in imports_at_the_head(file)
        if name not in ours | sys.stdlib_module_names
        and not brings & {canonicalize_name(holder) for holder in holders.get(name, ())}
    }
    assert missing == set()
