"""Settings as JSON and back.

    to_json(LangevinConfig(steps=5))   ->  {"steps": 5, "step_size": 0.15, ...}
    from_json(LangevinConfig, values)  ->  LangevinConfig(steps=5)

JSON from elsewhere is read against the types of a dataclass; what does not fit raises InvalidPrior, naming the place.
"""

import json
import math
import types
from collections.abc import Container, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..backbone.text import LONGEST_TEXT, hidden_characters

T = TypeVar("T")
# JSON has no infinities.
INFINITE = {"inf": math.inf, "-inf": -math.inf}
# Settings of older versions that this one has not, each with its value that stands for what is done now. A file with
# that value is read as if it lacked the setting; with another it is refused, as this version would do something else.
FORMER_SETTINGS: Mapping[str, Any] = {"curvature_limit": None, "vector_size": 0}
# Settings that files and checkpoints of older versions lack, whatever they were made with.
LATER_SETTINGS = frozenset(
    {
        "context",
        "drawing",
        "objective",
        "recovery_share",
        "recovery_weight",
        "noise_draws",
        "architecture",
        "digest_of_images",
    }
)
# Bounds on the values of a file, far above what any prior needs.
LARGEST_FILE = 2**22
LARGEST_NUMBER = 2**31
LONGEST_LIST = 10_000
# There are data sets of 21,841 classes.
MOST_TEXTS = 100_000


class InvalidPrior(ValueError):
    """A saved prior is damaged, or is none."""


def to_json(value: Any) -> Any:
    """A dataclass, list, mapping, number or text as JSON values, also NumPy's numbers and tensors of one; numbers that
    are not finite and all other objects become texts.
    """
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
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
    """Make a dataclass from JSON values.

    Args:
        kind: the dataclass. Its fields may be numbers, texts, booleans, Literals, None, sequences, mappings by name,
            dataclasses of such, and Any for what is read elsewhere.
        values: an object of JSON.
        where: name of the values in errors.

    Returns:
        An instance.

    Raises:
        InvalidPrior: an unknown or missing field, or a value of another type or out of range.
    """
    if not isinstance(values, dict):
        raise InvalidPrior(f"{where}: expected an object with the fields of {kind.__name__}, got {excerpt(values)}")
    expected = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    values = without_former_settings(values, expected)
    if unknown := [name for name in values if name not in expected]:
        name = unknown[0]
        if name in FORMER_SETTINGS:
            raise InvalidPrior(
                f"{where}.{name}: this version has no such setting and does what {excerpt(FORMER_SETTINGS[name])} "
                f"meant, got {excerpt(values[name])}; load it with the version that wrote it"
            )
        raise InvalidPrior(
            f"{where}: unknown field {excerpt(name)}; expected {', '.join(expected)}. "
            "A newer version may have written this file"
        )
    required = [name for name, field in expected.items() if field.default is field.default_factory is MISSING]
    if missing := [name for name in required if name not in values]:
        raise InvalidPrior(f"{where}: the field {missing[0]!r} is missing")
    hints = get_type_hints(kind)
    arguments = {name: read_value(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    try:
        return kind(**arguments)
    except (ValueError, TypeError) as error:
        raise InvalidPrior(f"{where}: {error}") from error


def without_former_settings(values: Mapping[str, Any], current: Container[str]) -> dict[str, Any]:
    """`values` without `FORMER_SETTINGS` that are not among the `current` ones and stand for what is done now."""
    return {
        name: value
        for name, value in values.items()
        if name in current or name not in FORMER_SETTINGS or value != FORMER_SETTINGS[name]
    }


def read_value(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as the type hint `kind` has it; InvalidPrior, naming `where`, for a value of another type."""
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
        most = MOST_TEXTS if inner[0] is str else LONGEST_LIST
        items = check_list(value, where, most)
        return tuple(read_value(inner[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        check_list(list(value), where)
        return {
            read_value(str, name, where): read_value(inner[1], item, f"{where}.{name}") for name, item in value.items()
        }
    if kind is type(None) and value is None:
        return None
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str) and len(value) <= LONGEST_TEXT and not hidden_characters(value):
        return value
    if kind in (int, float) and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER:
        return kind(value)
    if kind is float and isinstance(value, float) and math.isfinite(value):
        return value
    if kind is float and isinstance(value, str) and value in INFINITE:
        return INFINITE[value]
    raise InvalidPrior(f"{where}: expected {type_in_words(kind)}, got {excerpt(value)}")


def read_union(kinds: Sequence[Any], value: Any, where: str) -> Any:
    """A JSON value as the first of several type hints has it that it fits; where none does, the error is the last's."""
    others = [kind for kind in kinds if kind is not type(None)]
    if value is None and len(others) < len(kinds):
        return None
    for kind in others[:-1]:
        try:
            return read_value(kind, value, where)
        except InvalidPrior:
            continue
    return read_value(others[-1], value, where)


def check_list(value: Any, where: str, most: int = LONGEST_LIST) -> list[Any]:
    """The JSON value, if it is a list of at most `most` entries; InvalidPrior for anything else."""
    if not isinstance(value, list):
        raise InvalidPrior(f"{where}: expected a list, got {excerpt(value)}")
    if len(value) > most:
        raise InvalidPrior(f"{where}: expected at most {most} entries, got {len(value)}")
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
    check_length(path.stat().st_size, path.name)
    return parse_json(path.read_bytes(), path.name)


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """The object that the content of a JSON file holds; InvalidPrior, naming `where`, for anything else."""
    check_length(len(content), where)
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidPrior(f"{where}: no JSON ({error or type(error).__name__})") from error
    if not isinstance(values, dict):
        raise InvalidPrior(f"{where}: expected an object, got {excerpt(values)}")
    return values


def check_length(size: int, where: str) -> None:
    """Raise InvalidPrior for a file of more bytes than any prior needs."""
    if size > LARGEST_FILE:
        raise InvalidPrior(f"{where}: expected at most {LARGEST_FILE} bytes, got {size}")


def type_in_words(kind: Any) -> str:
    """A type hint as an error names it."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(repr(each) for each in get_args(kind))}"
    names = {
        int: f"an integer up to {LARGEST_NUMBER}",
        float: "a finite number",
        str: f"a text of at most {LONGEST_TEXT} characters, without control characters",
        bool: "true or false",
    }
    return names.get(kind, str(kind))


def excerpt(value: Any) -> str:
    """The beginning of a value, as an error shows it."""
    text = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."
