"""What a value may be: small rules that say in words what must be there instead.

A rule takes a value and returns None if it will do, else a `Fault`: where in the value
(empty for the whole), what stands there, and what must. Nothing here knows a key.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

MOST = 2**31 - 1  # counters are folded into random keys and kept in int32
LARGEST = 1e30  # numbers are float32 on the device


class Fault(NamedTuple):
    """The part of a value that will not do; `where` is put behind the key's name."""

    where: str
    value: Any
    wanted: str


Rule = Callable[[Any], Fault | None]


def whole(least: int, most: int = MOST) -> Rule:
    """A whole number between two, both included; True is none."""

    def rule(value: Any) -> Fault | None:
        if not isinstance(value, int) or isinstance(value, bool):
            return Fault("", value, "a whole number")
        if least <= value <= most:
            return None
        upper = "" if most == MOST else f", at most {most}"
        return Fault("", value, f"at least {least}{upper}")

    return rule


def number(
    least: int | float,
    most: int | float = LARGEST,
    *,
    above: bool = False,
    below: bool = False,
) -> Rule:
    """A finite number between two; `above`, `below`: not that bound itself."""

    def rule(value: Any) -> Fault | None:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return Fault("", value, "a number")
        low = value > least if above else value >= least
        high = value < most if below else value <= most
        if low and high and math.isfinite(value):
            return None
        lower = (
            []
            if least <= -LARGEST
            else [f"{'above' if above else 'at least'} {least:g}"]
        )
        bounded = most < LARGEST or value > most
        upper = [f"{'below' if below else 'at most'} {most:g}"] if bounded else []
        return Fault("", value, ", ".join(lower + upper) or "finite")

    return rule


def flag(value: Any) -> Fault | None:
    """True or False."""
    return None if isinstance(value, bool) else Fault("", value, "true or false")


def one_of(allowed: Iterable[str]) -> Rule:
    """One of these names."""

    def rule(value: Any) -> Fault | None:
        names = tuple(allowed)
        if isinstance(value, str) and value in names:
            return None
        return Fault("", value, f"one of {', '.join(names)}")

    return rule


def text(what: str = "", empty: bool = True) -> Rule:
    """A text that UTF-8 and the file system can hold; `what` tells what it names."""

    def rule(value: Any) -> Fault | None:
        if not isinstance(value, str) or not (value or empty):
            return Fault("", value, what or "a text")
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            return Fault("", value, "a text of whole characters")
        return None

    return rule


def regex(value: Any) -> Fault | None:
    """A regular expression."""
    if text()(value):
        return Fault("", value, "a regular expression")
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        return Fault("", value, f"a regular expression: {error}")
    return None


def row(
    element: Rule,
    what: str,
    *,
    least: int = 0,
    most: int = 10_000,
    distinct: bool = False,
    rising: bool = False,
) -> Rule:
    """A tuple of so many values; `what` tells what it must be as a whole."""

    def rule(value: Any) -> Fault | None:
        if not isinstance(value, tuple | list) or not least <= len(value) <= most:
            return Fault("", value, what)
        for place, one in enumerate(value):
            if fault := element(one):
                return Fault(f"[{place}]{fault.where}", fault.value, fault.wanted)
        pairs = zip(value, value[1:], strict=False)
        if rising and not all(first < second for first, second in pairs):
            return Fault("", value, f"{what}, in rising order, each once")
        if distinct and len(set(value)) != len(value):
            return Fault("", value, f"{what}, each once")
        return None

    return rule


def table(name: Rule, value_of: Rule) -> Rule:
    """A group whose names are the user's."""

    def rule(value: Any) -> Fault | None:
        if not isinstance(value, Mapping):
            return Fault("", value, "a group: names and their values")
        for key, one in value.items():
            if fault := name(key):
                return Fault("", key, fault.wanted)
            if fault := value_of(one):
                return Fault(f".{key}{fault.where}", fault.value, fault.wanted)
        return None

    return rule


def anything(value: Any) -> Fault | None:
    """Whatever JSON holds: it is kept in config.json."""
    if value is None or isinstance(value, bool | int | float | str):
        return None
    if isinstance(value, Mapping):
        return table(text("a name"), anything)(value)
    if isinstance(value, tuple | list):
        return row(anything, "a list", most=MOST)(value)
    return Fault("", value, "a number, a text, true, false, a list or a group")
