"""From the description of a sweep to its units: what each is called and started with."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowgrpo_jax import config as configs
from flowgrpo_jax.config import overrides
from flowgrpo_jax.errors import UserError, shown
from launch import hyper

_ARGUMENT = "config:"  # a key of what stands behind the colon of --config=FILE:...
_LONGEST = 100  # characters of a name: it is a folder in paths that are long already


@dataclasses.dataclass(frozen=True)
class Unit:
    """One run of a sweep.

    Attributes:
      wid: its number in the sweep, from 1.
      point: flag to value, what the sweep says of this unit.
      words: its whole command line behind `flowgrpo_jax.main`, without --workdir.
      name: WID-short_values, the name of its workdir.
    """

    wid: int
    point: Mapping[str, Any]
    words: tuple[str, ...]
    name: str


def load(source: str | None, config: str) -> hyper.Points:
    """The points of `FILE.py`, its function `sweep`, or of `FILE.py:FUNCTION`.

    By default of the `sweep` beside the config's get_config. UserError for anything
    that gives no points.
    """
    path, _, function = (source or config.partition(":")[0]).partition(":")
    name = function or "sweep"
    like = f"{name}(hyper), such as launch/sweeps/seeds.py"
    points = overrides.from_file("--sweep", _installed(path), name, (hyper,), like)
    return _points(points, f"--sweep: {path}: {name}")


def _installed(path: str) -> str:
    """A ready sweep or a config from where the package is installed, if not here."""
    name = Path(path)
    if name.parts[:2] == ("launch", "sweeps") and not name.exists():
        return str(Path(__file__).parent.joinpath(*name.parts[1:]))
    return overrides.installed(path)


def _points(given: Any, what: str) -> hyper.Points:
    """The points, if they are some: a user's function may give anything."""
    points: hyper.Points
    try:
        points = [dict(point) for point in given]
    except (TypeError, ValueError):
        points = []
    if not points or not all(isinstance(key, str) for one in points for key in one):
        raise UserError(
            f"{what} gives {shown(given)}: must be points, as hyper.sweep(key, values) "
            "makes them, and at least one"
        )
    return points


def make(config: str, points: hyper.Points, extra: Sequence[str] = ()) -> list[Unit]:
    """The units of a sweep, in order.

    Args:
      config: FILE.py or FILE.py:argument, for units that do not name their own.
      points: flag to value, for each unit.
      extra: words that all units get before their own, which win.
    """
    varying = [key for key in _keys(points) if len(_values(points, key)) > 1]
    units: list[Unit] = []
    for wid, point in enumerate(points, start=1):
        own = [key for key in point if key in varying]
        words = (f"--config={_source(config, point)}", *extra, *_flags(point, wid))
        for other in units:
            if other.words == words:
                raise UserError(
                    f"sweep: units {other.wid} and {wid} are the same: "
                    f"{' '.join(words)}"
                )
        units.append(Unit(wid, point, words, _name(wid, own, point)))
    return units


def short(keys: Sequence[str]) -> dict[str, str]:
    """Key to its last part, or to all of it where two would have the same."""
    last = {key: re.split("[.:]", key)[-1] for key in keys}
    names = list(last.values())
    return {key: name if names.count(name) == 1 else key for key, name in last.items()}


def _keys(points: hyper.Points) -> list[str]:
    return list(dict.fromkeys(key for point in points for key in point))


def _values(points: hyper.Points, key: str) -> set[str]:
    return {repr(point.get(key)) for point in points}


def _source(config: str, point: hyper.Point) -> str:
    """The unit's --config: its file, and its argument with the keys of `config:...`."""
    path, _, argument = str(point.get("config", config)).partition(":")
    chosen: dict[str, Any] = dict(configs.parse_argument(argument))
    for key, value in point.items():
        if key.startswith(_ARGUMENT):
            chosen[key.removeprefix(_ARGUMENT)] = value
    argument = ",".join(f"{key}={value}" for key, value in chosen.items())
    return f"{path}:{argument}" if argument else path


def _flags(point: hyper.Point, wid: int) -> list[str]:
    flags = []
    for key, value in point.items():
        if key == "config" or key.startswith(_ARGUMENT):
            continue
        if key == "workdir":
            raise UserError(
                f"unit {wid}: workdir: {shown(value)}: the launcher gives every unit "
                "its own: set --root"
            )
        if value is None:
            raise UserError(f"unit {wid}: {key}: None: must have a value")
        flags.append(f"--{key}={value}")
    return flags


def _name(wid: int, keys: Sequence[str], point: hyper.Point) -> str:
    """WID-short_values of what differs between units, in letters that no shell reads."""
    named = short(keys)
    values = [f"{named[key]}={_plain(point[key])}" for key in keys]
    return "-".join([str(wid), ",".join(values)[:_LONGEST]]) if values else str(wid)


def _plain(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", str(value)).strip("_")
