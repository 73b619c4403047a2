"""The words in which a sweep is written: product, zipit, chainit, sweep, fixed.

    def sweep(hyper):
        return hyper.product([
            hyper.sweep("config.seed", [1, 2]),
            hyper.zipit([
                hyper.sweep("config.group_size", [8, 16]),
                hyper.sweep("config.prompts_per_iteration", [32, 16]),
            ]),
        ])

They are those of big_vision's and kauldron's sweeps. Each gives a list of points, a point is
a mapping of flag to value, and they nest. A key is a flag of `flowgrpo_jax.main`
(`config.train.beta`, `model`), or `config:recipe`: what stands behind the colon of
`--config=FILE.py:recipe=NAME`, since a recipe sets other keys.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flowgrpo_jax.errors import UserError, shown

Point = Mapping[str, Any]
Points = list[Point]


def sweep(key: str, values: Iterable[Any]) -> Points:
    """One point for each value of a flag."""
    return [{key: value} for value in values]


def fixed(key: str, value: Any) -> Points:
    """One point: a flag that is the same in all units."""
    return sweep(key, [value])


def product(sweeps: Sequence[Points]) -> Points:
    """Every point of the first with every point of the next; the last varies fastest."""
    return [_joined(points) for points in itertools.product(*sweeps)]


def zipit(sweeps: Sequence[Points]) -> Points:
    """First with first, second with second; a sweep of one point goes with each.

    UserError for lengths that differ.
    """
    length = max(map(len, sweeps), default=0)
    for points in sweeps:
        if len(points) not in (1, length):
            raise UserError(
                f"sweep: zipit of {', '.join(str(len(each)) for each in sweeps)} "
                "points: all must have as many, or one"
            )
    rows = [points * length if len(points) == 1 else points for points in sweeps]
    return [_joined(points) for points in zip(*rows, strict=True)]


def chainit(sweeps: Sequence[Points]) -> Points:
    """The points of the first, then those of the next."""
    return list(itertools.chain(*sweeps))


def _joined(points: Sequence[Point]) -> Point:
    """One point of several; UserError if two of them set the same flag."""
    joined: dict[str, Any] = {}
    for point in points:
        for key, value in point.items():
            if key in joined:
                raise UserError(
                    f"sweep: {key}: {shown(value)}: is {shown(joined[key])} in the "
                    "same unit: name it once"
                )
            joined[key] = value
    return joined
