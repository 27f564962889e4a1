"""The options of a connector are the parameters of its `__init__`, with their types and defaults.

They are read from the text of the file, without importing torch, or from the loaded class where the
text does not suffice (a base class of another file, a computed default).
"""

from __future__ import annotations

import ast
import inspect
import types
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from vlbench.errors import UserError
from vlbench.text_files import read_text

MAX_OPTION = 10_000_000
"""Largest number that an option may be; layers, widths and tokens in use are far below."""
NAMED_KINDS = {"int": int, "float": float, "bool": bool, "str": str, "Any": Any, "None": None}


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
    except NameError:
        hints = {}
    result: dict[str, ConnectorOption] = {}
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[2:]:  # type: ignore[misc]
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            stars = "**" if parameter.kind == parameter.VAR_KEYWORD else "*"
            raise UserError(
                f"connector {cls.__name__} takes {stars}{name}; its options must be named"
            )
        kind = supported_kind(hints.get(name)) if name in hints else infer_kind(parameter.default)
        result[name] = ConnectorOption(kind, parameter.default)
    return result


def options_in_file(file: Path) -> dict[str, ConnectorOption] | None:
    """Return the options of the class in a connector file, None if the text does not suffice."""
    try:
        tree = ast.parse(read_text(file), str(file))
    except (SyntaxError, ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    cls = _connector_class(tree)
    init = _find_init(cls) if cls is not None else None
    if init is None or init.args.vararg or init.args.kwarg or init.args.posonlyargs:
        return None
    try:
        return _read_options(init.args)
    except ValueError:
        return None


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
    origin = get_origin(kind)
    if origin is list:
        return tuple[(*get_args(kind), ...)]  # type: ignore[misc]
    if origin in (Union, types.UnionType):
        members = [supported_kind(member) for member in get_args(kind)]
        return Any if Any in members else Union[tuple(members)]  # noqa: UP007
    plain = origin in (Literal, tuple) or kind in (int, float, bool, str, None, type(None))
    return kind if plain else Any


def _connector_class(tree: ast.Module) -> ast.ClassDef | None:
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    direct = [c for c in classes if any(_node_name(base) == "Connector" for base in c.bases)]
    # a class with another base may be a connector too, by a base class of another file
    unclear = [c for c in classes if c not in direct and c.bases and not _has_known_bases(c)]
    return direct[0] if len(direct) == 1 and not unclear else None


def _has_known_bases(cls: ast.ClassDef) -> bool:
    return all(
        _node_name(base) in ("Module", "NamedTuple", "Function", "Enum") for base in cls.bases
    )


def _node_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _find_init(cls: ast.ClassDef) -> ast.FunctionDef | None:
    functions = [node for node in cls.body if isinstance(node, ast.FunctionDef)]
    return next((node for node in functions if node.name == "__init__"), None)


def _read_options(args: ast.arguments) -> dict[str, ConnectorOption]:
    """Return the options of `__init__(self, shapes, ...)`; a ValueError if they are computed."""
    empty: Any = inspect.Parameter.empty
    required = len(args.args) - len(args.defaults)
    pairs = [
        (arg, args.defaults[i - required] if i >= required else None)
        for i, arg in enumerate(args.args)
    ]
    pairs = pairs[2:] + list(zip(args.kwonlyargs, args.kw_defaults, strict=True))
    result: dict[str, ConnectorOption] = {}
    for arg, node in pairs:
        default = empty if node is None else ast.literal_eval(node)
        kind = (
            infer_kind(default)
            if arg.annotation is None
            else supported_kind(_read_annotation(arg.annotation))
        )
        result[arg.arg] = ConnectorOption(kind, default)
    return result


def _read_annotation(node: ast.expr) -> Any:
    """Return the type that an annotation names; a ValueError for one that is not known here."""
    if isinstance(node, ast.Constant) and (node.value is None or node.value is Ellipsis):
        return node.value
    if isinstance(node, ast.Name) and node.id in NAMED_KINDS:
        return NAMED_KINDS[node.id]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return Union[_read_annotation(node.left), _read_annotation(node.right)]  # noqa: UP007
    if isinstance(node, ast.Subscript):
        return _read_subscript(_node_name(node.value), node.slice)
    raise ValueError(ast.unparse(node))


def _read_subscript(name: str, slice_node: ast.expr) -> Any:
    items = slice_node.elts if isinstance(slice_node, ast.Tuple) else [slice_node]
    if name == "Literal":
        return Literal[tuple(ast.literal_eval(item) for item in items)]
    kinds = tuple(_read_annotation(item) for item in items)
    if name == "Optional":
        return Union[kinds[0], None]  # noqa: UP007
    if name in ("tuple", "list"):
        return tuple[kinds] if name == "tuple" else tuple[kinds[0], ...]  # type: ignore[valid-type]
    raise ValueError(name)
