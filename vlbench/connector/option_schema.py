"""The options of a connector are the parameters of its `__init__`, with their types and defaults.

They are read from the text of the file, without importing torch, or from the loaded class where the
text does not suffice (a base class of another file, a computed default).
"""

from __future__ import annotations

import ast
import inspect
import types
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, Union, get_args, get_origin, get_type_hints

from vlbench.errors import UserError
from vlbench.text_files import read_text

MAX_OPTION = 10_000_000
"""Largest number that an option may be; layers, widths and tokens in use are far below."""
NAME_KEY = "name"
"""Key of a recipe's `connector` beside its options."""
NAMED_KINDS: dict[str, Any] = {"Any": Any, "Optional": Optional, "Union": Union}
NAMED_KINDS |= {kind.__name__: kind for kind in (int, float, bool, str, tuple, list)}
OTHER_BASES = {"Module", "NamedTuple", "Function", "Enum"}
"""Base classes that make no connector."""


class ConnectorOption(NamedTuple):
    """One option of a connector."""

    kind: Any
    """Declared type; Any where there is none."""
    default: Any
    """`inspect.Parameter.empty` where the option must be given."""


def options_of_class(cls: type) -> dict[str, ConnectorOption]:
    """Return the options of a loaded class."""
    try:
        hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    except (NameError, AttributeError, TypeError, SyntaxError):  # as names for type checkers alone
        hints = {}
    result: dict[str, ConnectorOption] = {}
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[2:]:  # type: ignore[misc]
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            raise UserError(
                f"connector {cls.__name__} takes {parameter}; its options must be named"
            )
        _refuse_reserved_name(name, f"connector {cls.__name__}")
        kind = supported_kind(hints[name]) if name in hints else infer_kind(parameter.default)
        result[name] = ConnectorOption(kind, parameter.default)
    return result


def options_in_file(file: Path) -> dict[str, ConnectorOption] | None:
    """Return the options of the class in a connector file, None if the text does not suffice."""
    try:
        tree = ast.parse(read_text(file), str(file))
    except (SyntaxError, ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    functions = [node for node in _connector_body(tree) if isinstance(node, ast.FunctionDef)]
    init = next((function.args for function in functions if function.name == "__init__"), None)
    if init is None or init.vararg or init.kwarg or init.posonlyargs:
        return None
    try:
        options = _read_options(init)
    except (ValueError, TypeError):
        return None
    for name in options:
        _refuse_reserved_name(name, str(file))
    return options


def _refuse_reserved_name(name: str, place: str) -> None:
    """Refuse an option that a recipe could not tell from the connector's own name."""
    if name == NAME_KEY:
        raise UserError(
            f"{place}: an option is called '{name}', and connector.{name} of a recipe is the "
            "connector's name; call the option otherwise"
        )


def check_option_size(value: Any) -> None:
    """Refuse a number, also one in a list, that is no size; a ValueError says what is allowed."""
    if isinstance(value, list | tuple):
        for item in value:
            check_option_size(item)
    elif isinstance(value, int | float) and not abs(value) <= MAX_OPTION:  # NaN is not
        limits = f"a number from {-MAX_OPTION:,} to {MAX_OPTION:,}"
        raise ValueError(f"must be {limits}, given {value:,}")


def infer_kind(default: Any) -> Any:
    """Return the type of an option that has a default and no annotation."""
    return type(default) if type(default) in (int, float, bool, str) else Any


def supported_kind(kind: Any) -> Any:
    """Return an annotation as a type that values are checked for; a list is a tuple."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (list, tuple) and args:
        items = [item if item is ... else supported_kind(item) for item in args]
        return tuple[(*items, ...) if origin is list else tuple(items)]  # type: ignore[misc]
    if origin in (Union, types.UnionType):
        members = [supported_kind(member) for member in args]
        return Any if Any in members else Union[tuple(members)]  # noqa: UP007
    is_plain = origin is Literal or kind in (int, float, bool, str, None, type(None))
    return kind if is_plain else Any


def _connector_body(tree: ast.Module) -> list[ast.stmt]:
    """Return the body of the class that is the connector; [] where the text leaves it open."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    # a class with another base may be a connector too, by a base class of another file
    possible = [cls for cls in classes if not set(map(_last_name, cls.bases)) <= OTHER_BASES]
    if len(possible) == 1 and "Connector" in map(_last_name, possible[0].bases):
        return possible[0].body
    return []


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _read_options(init: ast.arguments) -> dict[str, ConnectorOption]:
    """Return the options of `__init__(self, shapes, ...)`; a ValueError if they are computed."""
    defaults = [None] * (len(init.args) - len(init.defaults)) + init.defaults
    pairs = list(zip(init.args, defaults, strict=True))[2:]
    pairs += zip(init.kwonlyargs, init.kw_defaults, strict=True)
    result: dict[str, ConnectorOption] = {}
    for argument, node in pairs:
        default = inspect.Parameter.empty if node is None else ast.literal_eval(node)
        annotation = argument.annotation
        kind = supported_kind(_read_annotation(annotation)) if annotation else infer_kind(default)
        result[argument.arg] = ConnectorOption(kind, default)
    return result


def _read_annotation(node: ast.expr) -> Any:
    """Return the type that an annotation names; a ValueError for one that is not known here."""
    match node:
        case ast.Constant(value=None | types.EllipsisType()):
            return node.value
        case ast.Name() if node.id in NAMED_KINDS:
            return NAMED_KINDS[node.id]
        case ast.Tuple():
            return tuple(map(_read_annotation, node.elts))
        case ast.BinOp(op=ast.BitOr()):
            return Union[_read_annotation(node.left), _read_annotation(node.right)]  # noqa: UP007
        case ast.Subscript() if _last_name(node.value) == "Literal":
            return Literal[ast.literal_eval(node.slice)]
        case ast.Subscript() if _last_name(node.value) in NAMED_KINDS:
            return NAMED_KINDS[_last_name(node.value)][_read_annotation(node.slice)]
    raise ValueError(ast.unparse(node))
