"""ROOT/XID: which sweep was launched there, kept in sweep.json.

The same sweep started again is the same folder, whose units go on. Another sweep under
the same XID is refused before anything is changed.
"""

import dataclasses
import fnmatch
import json
from collections.abc import Sequence
from pathlib import Path

from flowgrpo_jax import config as configs
from flowgrpo_jax.errors import UserError, shown
from flowgrpo_jax.runtime.workdir import atomic_write, locate, parse_json, user_errors
from launch.units import Unit

_FILE = "sweep.json"


@dataclasses.dataclass(frozen=True)
class SweepDir:
    """A folder ROOT/XID, the units that are to run in it, and what launched them."""

    path: Path
    units: tuple[Unit, ...]
    command: str

    @property
    def xid(self) -> str:
        return self.path.name

    def workdir(self, unit: Unit) -> Path:
        return self.path / unit.name

    def words(self, unit: Unit, root: str | None = None) -> list[str]:
        """The unit's flags for `main`; `root`: what ROOT is called where it runs."""
        parent = self.path if root is None else Path(root) / self.xid
        return [*unit.words, f"--workdir={parent / unit.name}"]


def open_sweep(
    root: str, xid: str | None, units: Sequence[Unit], command: str
) -> SweepDir:
    """ROOT/XID of these units, made or found.

    Without `xid`: the one that holds the same sweep, or the next number. UserError if
    `xid` holds another one.
    """
    place = locate(root)
    if xid is not None and (not xid or "/" in xid or xid in (".", "..")):
        raise UserError(f"--xid: {shown(xid)}: must be a name or a number, no path")
    if xid is None:
        numbers = [int(path.name) for path in _sweeps(place) if path.name.isdigit()]
        same = [n for n in numbers if not _difference(read(place / str(n)), units)]
        xid = str(max(same) if same else max(numbers, default=0) + 1)
    path = place / xid
    if (path / _FILE).exists():
        if difference := _difference(read(path), units):
            raise UserError(
                f"--xid: {xid}: {path} holds another sweep: {difference}: take another "
                "--xid, or leave it out"
            )
    elif path.exists() and any(path.iterdir()):
        raise UserError(f"--xid: {xid}: {path} holds no sweep: take another --xid")
    made = SweepDir(path, tuple(units), command)
    with user_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    held = dataclasses.asdict(made) | {"path": str(path)}
    atomic_write(path / _FILE, json.dumps(held, indent=1, default=str) + "\n")
    return made


def read(path: str | Path) -> SweepDir:
    """What was launched in ROOT/XID; UserError if nothing was, or it cannot be read."""
    path = locate(path)
    try:
        held = parse_json((path / _FILE).read_text())
        units = [Unit(**unit) for unit in held["units"]]
        units = [dataclasses.replace(unit, words=tuple(unit.words)) for unit in units]
        return SweepDir(path, tuple(units), held["command"])
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: holds no {_FILE}: give ROOT/XID, as a launcher prints it"
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path / _FILE}: cannot be read ({error}): delete it, and launch again"
        ) from error


def _sweeps(root: Path) -> list[Path]:
    return [path.parent for path in root.glob(f"*/{_FILE}")]


def _difference(there: SweepDir, units: Sequence[Unit]) -> str:
    """How the sweep there differs from these units, or "".

    Values that a resumed run may change (`num_iterations`, where rewards are asked)
    make no other sweep.
    """
    if len(there.units) != len(units):
        return f"of {len(there.units)} units, these are {len(units)}"
    for old, new in zip(there.units, units, strict=True):
        before, now = _fixed(old.words), _fixed(new.words)
        if before != now or old.name != new.name:
            other = [word for word in before if word not in now] or [old.name]
            mine = [word for word in now if word not in before] or [new.name]
            return f"unit {new.wid} has {other[0]} there and {mine[0]} here"
    return ""


def _fixed(words: Sequence[str]) -> list[str]:
    """The words without those that set what a resumed run may change."""
    free = [f"--config.{key}" for key in configs.MAY_DIFFER]

    def may_differ(word: str) -> bool:
        flag = word.partition("=")[0]
        return any(
            fnmatch.fnmatchcase(flag, glob) or fnmatch.fnmatchcase(flag, f"{glob}.*")
            for glob in free
        )

    return [word for word in words if not may_differ(word)]
