"""The error a user sees: one line with the key, the bad value and the remedy."""

from collections.abc import Iterable, Mapping
from typing import Any


class UserError(ValueError):
    """Wrong input; the commands print its single line and exit non-zero.

    `shown` stands above the line: the traceback of a user's own code, if that raised.
    """

    shown: str = ""


def shown_above(error: BaseException | None) -> str:
    """What stands above the line of this error, or of those that it came from."""
    passed: list[BaseException] = []
    while isinstance(error, UserError) and error not in passed:
        if error.shown:
            return error.shown
        passed.append(error)
        error = error.__cause__
    return ""


def shown(value: Any) -> str:
    """A value for a line: short, and with its type where the text hides it."""
    try:
        text = value if isinstance(value, str) and value else repr(value)
        text = text.encode(errors="backslashreplace").decode()
    except Exception as error:  # the repr of a user's object, a number of many digits
        text = f"a {type(value).__name__} ({type(error).__name__})"
    if not isinstance(value, str | int | float | tuple | list | Mapping | None):
        text = f"{type(value).__name__} {text}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def not_one_of(
    key: str, value: Any, allowed: Iterable[Any], more: str = "", why: str = ""
) -> UserError:
    """The line for a value that is none of `allowed`.

    `more` is what follows the names; `why` tells, before them, what rules the value out.
    """
    reason = f"{why}: " if why else ""
    names = ", ".join(map(str, allowed))
    return UserError(f"{key}: {shown(value)}: {reason}must be one of {names}{more}")
