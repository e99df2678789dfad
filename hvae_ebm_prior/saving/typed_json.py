"""Settings as JSON and back. What comes back may be anybody's: it is read against the types of a dataclass, and nothing
else gets through.

    to_json(LangevinConfig(steps=5))  ->  {"steps": 5, "step_size": 0.15, ...}
    from_json(LangevinConfig, values) ->  LangevinConfig(steps=5), or InvalidPrior

which says what is wrong, and where.
"""

import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
# JSON has no infinities.
INFINITE = {"inf": math.inf, "-inf": -math.inf}
# Bounds on what a file may say, far above what any prior needs.
LARGEST_FILE = 2**20
LARGEST_NUMBER = 2**31
LONGEST_TEXT = 1000
LONGEST_LIST = 10_000


class InvalidPrior(ValueError):
    """A saved prior is damaged, or is none."""


def to_json(value: Any) -> Any:
    """A dataclass, list, mapping, number or text as JSON values; numbers that are not finite become texts, and so does
    whatever else there is.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): to_json(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_json(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def from_json(kind: type[T], values: Any, where: str) -> T:
    """A dataclass from JSON values.

    Args:
        kind: the dataclass. Its fields may be numbers, texts, booleans, Literals, None, sequences, mappings by name,
            dataclasses of such, and Any for what is read elsewhere.
        values: what was read.
        where: name of the values in errors.

    Returns:
        An instance.

    Raises:
        InvalidPrior: an unknown or missing field, or a value of another type or out of range.
    """
    if not isinstance(values, dict):
        raise InvalidPrior(f"{where}: expected an object with the fields of {kind.__name__}, got {shown(values)}")
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := [name for name in values if name not in known]:
        raise InvalidPrior(
            f"{where}: unknown field {shown(unknown[0])}; expected {', '.join(known)}. A newer version may have written this file"
        )
    missing = [
        name
        for name, field in known.items()
        if name not in values and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise InvalidPrior(f"{where}: the field {missing[0]!r} is missing")
    hints = get_type_hints(kind)
    given = {name: read(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    try:
        return kind(**given)
    except (ValueError, TypeError) as error:
        raise InvalidPrior(f"{where}: {error}") from error


def read(kind: Any, value: Any, where: str) -> Any:
    """A value of a type hint from a JSON value; InvalidPrior naming `where` for any other."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind):
        return from_json(kind, value, where)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        return read_union(inner, value, where)
    if origin is Literal and any(value == each and type(value) is type(each) for each in inner):
        return value
    if isinstance(origin, type) and issubclass(origin, Sequence):  # tuples are of any length, of one type
        return tuple(read(inner[0], item, f"{where}[{i}]") for i, item in enumerate(read_list(value, where)))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        read_list(list(value), where)
        return {read(str, name, where): read(inner[1], item, f"{where}.{name}") for name, item in value.items()}
    if kind is type(None) and value is None:
        return None
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str) and len(value) <= LONGEST_TEXT:
        return value
    if kind in (int, float) and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER:
        return kind(value)
    if kind is float and isinstance(value, float) and math.isfinite(value):
        return value
    if kind is float and isinstance(value, str) and value in INFINITE:
        return INFINITE[value]
    raise InvalidPrior(f"{where}: expected {described(kind)}, got {shown(value)}")


def read_union(kinds: Sequence[Any], value: Any, where: str) -> Any:
    """A value of the first of several type hints that it fits; of None and one other, with the error of the other."""
    others = [kind for kind in kinds if kind is not type(None)]
    if value is None and len(others) < len(kinds):
        return None
    for kind in others[:-1]:
        try:
            return read(kind, value, where)
        except InvalidPrior:
            continue
    return read(others[-1], value, where)


def read_list(value: Any, where: str) -> list[Any]:
    """A JSON list of bounded length; InvalidPrior for anything else."""
    if not isinstance(value, list):
        raise InvalidPrior(f"{where}: expected a list, got {shown(value)}")
    if len(value) > LONGEST_LIST:
        raise InvalidPrior(f"{where}: expected at most {LONGEST_LIST} entries, got {len(value)}")
    return value


def read_json_file(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: the file.

    Returns:
        Its values.

    Raises:
        InvalidPrior: the file is too large, or holds anything else.
        OSError: it cannot be read.
    """
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise InvalidPrior(f"{path.name}: expected at most {LARGEST_FILE} bytes, got {size}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidPrior(f"{path.name}: no JSON ({error or type(error).__name__})") from error
    if not isinstance(values, dict):
        raise InvalidPrior(f"{path.name}: expected an object, got {shown(values)}")
    return values


def described(kind: Any) -> str:
    """A type hint, for an error."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(repr(each) for each in get_args(kind))}"
    names = {
        int: f"an integer up to {LARGEST_NUMBER}",
        float: "a finite number",
        str: f"a text of at most {LONGEST_TEXT} characters",
        bool: "true or false",
    }
    return names.get(kind, str(kind))


def shown(value: Any) -> str:
    """A value, for an error: its beginning."""
    text = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."
