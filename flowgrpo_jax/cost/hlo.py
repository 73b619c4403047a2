"""Collectives of a compiled program, read from the text of its scheduled HLO.

What XLA prints for `jax.stages.Compiled.as_text()`: computations, each a line per
instruction in the order in which a device carries them out. On TPU a collective that
runs beside others is either a pair of `-start` and `-done`, or ("async collective
fusion") a chain of fusions that begins with one that holds AsyncCollectiveStart, goes
on inside fusions that compute something else, and ends in one with AsyncCollectiveDone.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Bytes of an element by the name of its type; smaller types do not travel here.
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4}
_BYTES |= {"u32": 4, "f64": 8, "s64": 8, "u64": 8}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute")
_HEAD = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations=\{)=?%([\w.\-]+)")
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective of a program and how often a device takes part in it.

    `received`: bytes that reach a device each time, if all are equal. `name`: where it
    was traced. `asynchronous`: whether something else is computed meanwhile.
    """

    kind: str
    received: float
    times: float
    name: str
    asynchronous: bool

    @property
    def total(self) -> float:
        return self.received * self.times


def collectives(
    text: str, open_loop: float = 1.0, branch: float = 1.0
) -> list[Collective]:
    """Those of a program, in the order of its text.

    `open_loop`: how often a loop without a constant end goes round. `branch`: how often
    one side of a conditional is taken, of once.
    """
    program = _Program(text)
    return list(program.walk(program.entry, 1.0, open_loop, branch))


class _Program:
    def __init__(self, text: str):
        self.computations: dict[str, list[str]] = {}
        self.entry = ""
        lines: list[str] = []
        for line in text.splitlines():
            if head := _HEAD.match(line):
                lines = self.computations[head[1]] = []
                if line.startswith("ENTRY"):
                    self.entry = head[1]
            elif line.startswith("  "):
                lines.append(line)

    def walk(
        self, name: str, times: float, open_loop: float, branch: float
    ) -> Iterator[Collective]:
        for line in self.computations[name]:
            found = _INSTRUCTION.match(line)
            if not found:
                continue
            _, shape, kind = found.groups()
            base = kind.removesuffix("-start")
            if base in _KINDS:
                yield _collective(line, shape, base, times, base != kind)
            elif kind == "fusion":
                yield from self._fused(_CALLED.findall(line)[0], times)
            elif kind == "while":
                rounds = self._rounds(line, open_loop) * times
                body = re.findall(r"body=%([\w.\-]+)", line)[0]
                yield from self.walk(body, rounds, open_loop, branch)
            elif kind == "conditional":
                for side in _branches(line):
                    yield from self.walk(side, times * branch, open_loop, branch)
            elif kind in ("call", "async-start"):
                for called in _CALLED.findall(line):
                    yield from self.walk(called, times, open_loop, branch)

    def _fused(self, name: str, times: float) -> Iterator[Collective]:
        """Of a chain of fusions the first one counts; the others go on with it."""
        lines = self.computations[name]
        if any("AsyncCollectiveStart" in line for line in lines):
            for line in lines:
                found = _INSTRUCTION.match(line)
                if found and found[3] in _KINDS:
                    yield _collective(line, found[2], found[3], times, True)

    def _rounds(self, line: str, open_loop: float) -> float:
        """The constant that the counter of a loop is compared with."""
        condition = re.findall(r"condition=%([\w.\-]+)", line)[0]
        lines = self.computations[condition]
        ends = [re.findall(r" constant\((\d+)\)", one) for one in lines]
        constants = [float(end[0]) for end in ends if end]
        return constants[0] if len(constants) == 1 else open_loop


def _branches(line: str) -> list[str]:
    listed = re.findall(r"branch_computations=\{([^}]*)\}", line)
    names = listed[0] if listed else " ".join(re.findall(r"\w+_computation=%\S+", line))
    return re.findall(r"%([\w.\-]+)", names)


def _collective(
    line: str, shape: str, kind: str, times: float, asynchronous: bool
) -> Collective:
    sizes = [
        math.prod(int(side) for side in sides.split(",") if side) * _BYTES[name]
        for name, sides in _SHAPE.findall(shape)
        if name in _BYTES
    ]
    # A start gives what went in and what will come out.
    size = max(sizes, default=0) if asynchronous else sum(sizes)
    count = _group(line)
    others = (count - 1) / count
    received = {
        "all-gather": size * others,
        "all-reduce": 2 * size * others,
        "reduce-scatter": size * (count - 1),  # of which a device keeps one part
        "collective-permute": float(size),
    }[kind]
    names = re.findall(r'op_name="([^"]*)"', line)
    return Collective(kind, received, times, names[0] if names else "", asynchronous)


def _group(line: str) -> int:
    """Devices that take part together: {{0,1},{2,3}} or [groups,devices]<=[...]."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    return 1
