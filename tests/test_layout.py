"""The house: what stands at the top, and that every folder says what it is."""

import ast
import re
from pathlib import Path

import flowgrpo_jax

PACKAGE = Path(flowgrpo_jax.__file__).parent
ROOT = Path(__file__).parents[1]
COMMANDS = {"main", "sample", "evaluate", "compare", "export", "estimate", "replay"}


def test_the_top_level():
    """Oracle: the list, by hand; anything else belongs into a folder."""
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert files == COMMANDS | {"__init__", "train", "cli", "errors"}


def test_every_folder_says_what_lives_there_and_what_does_not():
    """Oracle: the first line of its docstring."""
    for path in PACKAGE.rglob("*"):
        if not path.is_dir() or not list(path.glob("*.py")):
            continue
        told = ast.get_docstring(ast.parse((path / "__init__.py").read_text())) or ""
        first = told.splitlines()[0]
        assert re.search(r"\b(no|not|nothing)\b", first, re.IGNORECASE), path


def test_citations_can_be_followed():
    """Oracle: the sections of docs/golden_numbers.md; what is cited is in here."""
    golden = (ROOT / "docs" / "golden_numbers.md").read_text()
    sections = set(re.findall(r"^## (\d+) ", golden, re.MULTILINE))
    folders = ("tests", "benchmarks", "examples", "flowgrpo_jax", "configs", "docs")
    folders += ("colabs",)
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.*")]
    cited = set()
    for file in files:
        if file.suffix not in (".py", ".md") or file.name == Path(__file__).name:
            continue
        text = file.read_text()
        for number in re.findall(r"golden_numbers\.md (\d+)", text):
            assert number in sections, f"{file}: {number}"
            cited.add(number)
        for name in re.findall(r"\bdocs/[a-z_0-9]+\.md\b", text):
            assert (ROOT / name).exists(), f"{file}: {name}"
        elsewhere = r"\breference/[a-z]|\bshared/reference|DESIGN\.md|\b20c\b"
        assert not re.search(elsewhere, text), file
    assert cited == sections


def test_links_between_documents_lead_somewhere():
    """Oracle: the files; a link goes out from the folder of its document."""
    folders = (ROOT, ROOT / "docs", ROOT / "colabs")
    for file in (one for folder in folders for one in folder.glob("*.md")):
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", file.read_text()):
            assert (file.parent / link).exists(), f"{file}: {link}"
