"""docs/reliability.md: a section for every command that measures how a run lasts."""

import platform
import re
from importlib import metadata
from pathlib import Path

_PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
_PACKAGES = ("jax", "orbax-checkpoint", "numpy")


def write(title: str, command: str, text: str) -> None:
    """Replace the section of that title: the command, where it ran, what it printed."""
    page = _PAGE.read_text() if _PAGE.exists() else "# Reliability\n"
    section = f"## {title}\n\n    {command}\n\n{_machine()}\n\n{text.strip()}\n"
    found = re.search(rf"^## {re.escape(title)}$.*?(?=^## |\Z)", page, re.M | re.S)
    if found:
        page = page[: found.start()] + section + "\n" + page[found.end() :]
    else:
        page = page.rstrip() + "\n\n" + section
    _PAGE.write_text(page.rstrip() + "\n")


def _machine() -> str:
    cpu = next(
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)
    return f"{cpu}, Python {platform.python_version()}, {versions}."
