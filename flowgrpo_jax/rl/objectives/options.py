"""Options of objectives: frozen dataclasses whose fields say what they may hold.

A field's default is the option's, and one without a default must be given. What it
may be is its type (a Literal's words, true or false) or, for numbers, `Between`.
"""

import dataclasses
import typing
from collections.abc import Iterable
from typing import Any, NamedTuple

from flowgrpo_jax.errors import UserError


class Between(NamedTuple):
    """The numbers that will do; `above`, `below`: not that bound itself."""

    least: int | float
    most: int | float | None
    above: bool
    below: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Of an objective that has none."""


def number(
    default: Any = dataclasses.MISSING,
    *,
    least: int | float = 0,
    most: int | float | None = None,
    above: bool = False,
    below: bool = False,
) -> Any:
    """A field of a number between two; without a default it must be given."""
    between = Between(least, most, above, below)
    return dataclasses.field(default=default, metadata={"between": between})


def names(options: type) -> tuple[str, ...]:
    """The options of a class."""
    return tuple(field.name for field in dataclasses.fields(options))


def choices(field: dataclasses.Field) -> tuple[str, ...]:
    """The words that an option may be; none if it is no word."""
    if typing.get_origin(field.type) is not typing.Literal:
        return ()
    return typing.get_args(field.type)


def between(field: dataclasses.Field) -> Between | None:
    """The numbers that an option may be; None if it is no number."""
    return field.metadata.get("between")


def check_names(objective: str, options: type, given: Iterable[str]) -> None:
    """UserError for an option that the objective does not have."""
    known = names(options)
    for name in given:
        if name not in known:
            raise UserError(
                f"train.objective_options.{name}: no option of {objective}; its "
                f"options: {', '.join(known) or 'none'}"
            )
