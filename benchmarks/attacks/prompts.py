"""Prompt files that people have, and some that nobody should."""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.attacks.table import Row, one_line, row
from flowgrpo_jax.data import prompts as prompt_data
from flowgrpo_jax.data.prompt_files import load_prompts

_LINE = '{"prompt": "a photo of a red circle"}'
# name -> bytes of a .jsonl, and whether they can be read.
FILES: dict[str, tuple[bytes, bool]] = {
    "10 MB line": (json.dumps({"prompt": "a" * 10_000_000}).encode(), True),
    "CRLF": (f"{_LINE}\r\n{_LINE}\r\n".encode(), True),
    "byte order mark": (f"{_LINE}\n".encode("utf-8-sig"), True),
    "escapes": (rb'{"prompt": "a \"red\" \u00e9 circle"}', True),
    "blanks at the end": (f"{_LINE}\n\n\n".encode(), True),
    "blank line": (f"{_LINE}\n\n{_LINE}".encode(), False),
    "Latin-1": ('{"prompt": "caf\u00e9"}'.encode("latin-1"), False),
    "UTF-16": (_LINE.encode("utf-16"), False),
    "NaN": (b'{"prompt": "a", "count": NaN}', False),
    "a list": (b'["a", "b"]', False),
    "no prompt": (b'{"text": "a"}', False),
    "deep": (b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", False),
    "5,000 digits": (b'{"prompt": "a", "x": ' + b"9" * 5000 + b"}", False),
    "tag that is a list": (b'{"prompt": "a", "tag": ["x"]}', False),
    "broken emoji": (rb'{"prompt": "a \ud83d circle"}', False),
    "empty file": (b"", False),
}


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        yield _files(Path(folder))
        yield _million(Path(folder))


def _files(folder: Path) -> Row:
    outcomes = []
    for number, (name, (data, readable)) in enumerate(FILES.items()):
        path = folder / f"{number}.jsonl"
        path.write_bytes(data)
        outcome = one_line(lambda path=path: load_prompts(path))
        if readable:
            accepted = outcome is not None and outcome.startswith("accepted")
            outcome = None if accepted else f"{name}: {outcome or 'refused'}"
        outcomes.append(outcome and f"{name}: {outcome}")
    csv = folder / "a.csv"
    csv.write_text("prompt\na\n")
    outcomes.append(one_line(lambda: load_prompts(csv)))
    return row(
        f"prompt files: {', '.join(FILES)}, .csv",
        outcomes,
        "read, or one line with file and line number",
    )


def _million(folder: Path) -> Row:
    path = folder / "million.txt"
    path.write_text("".join(f"a photo of {n} circles\n" for n in range(1_000_000)))
    begin = time.process_time()
    loaded = load_prompts(path)
    first = prompt_data.batch(loaded, 0, 0, 48)
    seconds = time.process_time() - begin
    right = len(loaded) == 1_000_000 and len({one.text for one in first}) == 48
    return row(
        "1,000,000 prompts",
        [None if right else "not all of them"],
        f"read, and a batch drawn, in {seconds:.0f} s of one processor",
    )
