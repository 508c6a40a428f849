"""JSON read field by field: everything is asked for by name, kind and range, and nothing else may be there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

SHOWN = 40
"""Characters of a value that an error shows."""


def parse(text: str) -> Fields:
    """The outermost object of a JSON text. Raises ValueError for other texts, NaN, infinity and names said twice."""
    try:
        return Fields(json.loads(text, parse_int=_integer, parse_constant=_no_constant, object_pairs_hook=_unique), "")
    except RecursionError as error:
        raise ValueError(
            "Got JSON that is nested too deeply; wanted a guidance preset. Choose another file."
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"Got a text that is no JSON ({error}); wanted a guidance preset. Choose another.") from error


def _integer(word: str) -> int | float:
    """Python refuses to read thousands of digits, in words of its own: such numbers are out of every range here."""
    return int(word) if len(word) <= SHOWN else float(word)


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"Got the number {word} in a guidance preset; wanted finite ones. Correct the file.")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(
                f"Got the field {name[:SHOWN]} twice in a guidance preset; wanted it once. Correct the file."
            )
        found[name] = value
    return found


def refuse(path: str, got: object, wanted: str) -> NoReturn:
    """Raises ValueError for the value of a field."""
    raise ValueError(
        f"The field {path or 'of the whole'} of this guidance preset is {_shown(got)}; wanted {wanted}. Correct the "
        "file, or save the preset again."
    )


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


class Fields:
    """The fields of one object; ``path`` says where it stands. ``end`` refuses what nobody asked for."""

    def __init__(self, value: object, path: str) -> None:
        if not isinstance(value, dict):
            refuse(path, value, "an object with named fields")
        self.values: dict[str, Any] = value
        self.path = path
        self.asked: set[str] = set()

    def at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def take(self, name: str) -> object:
        """Whatever is there. Raises ValueError where nothing is."""
        self.asked.add(name)
        if name not in self.values:
            raise ValueError(
                f"The field {self.at(name)} is missing in this guidance preset. Add it, or save the preset again."
            )
        return self.values[name]

    def number(self, name: str, low: float, high: float) -> float:
        return number(self.take(name), self.at(name), low, high)

    def whole(self, name: str, low: int, high: int) -> int:
        return whole(self.take(name), self.at(name), low, high)

    def flag(self, name: str) -> bool:
        value = self.take(name)
        return value if isinstance(value, bool) else refuse(self.at(name), value, "true or false")

    def word(self, name: str, choices: Sequence[str]) -> str:
        value = self.take(name)
        if not isinstance(value, str) or value not in choices:
            refuse(self.at(name), value, f"one of {', '.join(choices)}")
        return value

    def items(self, name: str, most: int, read: Callable[[object, str], T], least: int = 0) -> tuple[T, ...]:
        """A list, every item read with where it stands."""
        value = self.take(name)
        if not isinstance(value, list) or not least <= len(value) <= most:
            refuse(self.at(name), value, f"a list of {least} to {most}")
        return tuple(read(item, f"{self.at(name)}[{i}]") for i, item in enumerate(value))

    def optional(self, name: str, read: Callable[[str], T]) -> T | None:
        """None where the field is null, else what ``read`` makes of its name."""
        return None if self.take(name) is None else read(name)

    def part(self, name: str, read: Callable[[Fields], T]) -> T | None:
        """An object that may be null."""
        value = self.take(name)
        return None if value is None else whole_object(value, self.at(name), read)

    def end(self) -> None:
        """Raises ValueError for fields that were not asked for."""
        for name in self.values:
            if name not in self.asked:
                raise ValueError(
                    f"The field {self.at(name[:SHOWN])} of this guidance preset is not known. Take it out; it may be "
                    "of a newer version of this pack."
                )


def whole_object(value: object, path: str, read: Callable[[Fields], T]) -> T:
    """What ``read`` makes of an object, to its last field. What it finds wrong is said with the object's place."""
    fields = Fields(value, path)
    try:
        made = read(fields)
    except Invalid as error:
        refuse(path, value, str(error))
    fields.end()
    return made


class Invalid(ValueError):
    """Fields that are right one by one and do not fit each other; says what was wanted."""


def valid(make: Callable[[], T]) -> T:
    """What ``make`` makes. What its own check says becomes an ``Invalid``."""
    try:
        return make()
    except ValueError as error:
        raise Invalid(f"values that fit ({error})") from error


def number(value: object, path: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        refuse(path, value, f"a number from {low:g} to {high:g}")
    return float(value)


def whole(value: object, path: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        refuse(path, value, f"a whole number from {low} to {high}")
    return value
