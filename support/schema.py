"""What a file from elsewhere may say: its fields, their types and bounds, checked in one place.

A format is described by a dataclass, and `conform` makes one of what was read, or says what is
wrong and where: "config.unet.model_channels is 'wide'; expected a whole number".
"""
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import get_args, get_origin, get_type_hints

from support.errors import UserError

BOUNDS = {int: (0, 2**16), float: (-1e30, 1e30)}
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text",
         dict: "a table", tuple: "a list"}


class SchemaError(UserError):
    """A field that is missing, unknown, of another type or out of bounds."""


def conform(kind: type, value: object, where: str,
            bounds: Mapping[str, tuple[float, float]] = BOUNDS, spare: bool = False) -> object:
    """`value`, as JSON or a checkpoint gives it, as `kind` describes it.

    kind    a dataclass (for a table of its fields; those without a default must be there),
            X | None, tuple[X, ...], tuple[X, Y], dict[str, X], bool, int, float, str, another class
    where   what a message calls the value
    bounds  name of a field -> the least and the most; others have those of BOUNDS. NaN is out
    spare   whether a table may have fields that the dataclass does not name; they are left out

    Raises SchemaError.
    """
    def refuse(expected: str):
        raise SchemaError(f"{where} is {value!r:.60}; expected {expected}")

    def inside(inner: type, value: object, name: object) -> object:
        return conform(inner, value, f"{where}.{name}".lstrip("."), bounds, spare)

    if isinstance(kind, UnionType):
        if value is None and NoneType in get_args(kind):
            return None
        kind = get_args(kind)[0]
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if is_dataclass(kind) or origin is dict:
        if not isinstance(value, dict) or not all(type(name) is str for name in value):
            refuse(WORDS[dict])
        if origin is dict:
            return {name: inside(inner[1], item, name) for name, item in value.items()}
        known = {each.name: each for each in fields(kind)}
        for name, each in known.items():
            if name not in value and each.default is each.default_factory is MISSING:
                raise SchemaError(f"{where or 'it'} has no {name}")
        for name in value.keys() - known.keys() if not spare else ():
            raise SchemaError(f"{where or 'it'} has {name!r:.60}; it may have {', '.join(known)}")
        types = get_type_hints(kind)
        return kind(**{name: inside(types[name], value[name], name)
                       for name in known if name in value})
    if origin is tuple:
        if not isinstance(value, list | tuple):
            refuse(WORDS[tuple])
        kinds = [inner[0]] * len(value) if inner[-1] is ... else inner
        if len(kinds) != len(value):
            refuse(f"a list of {len(kinds)}")
        return tuple(inside(*pair, i) for i, pair in enumerate(zip(kinds, value, strict=True)))
    if kind is float and type(value) is int:
        value = float(min(max(value, -10**40), 10**40))
    if kind in WORDS and type(value) is not kind or not isinstance(value, kind):
        refuse(WORDS.get(kind, f"a {kind.__name__}"))
    if kind in BOUNDS:
        least, most = bounds.get(where.rpartition(".")[2], BOUNDS[kind])
        if not least <= value <= most:
            refuse(f"{WORDS[kind]} between {least:g} and {most:g}")
    return value
