"""Prompt files: what is read, and what is refused with file and line."""

import json
import os

import pytest

from flowgrpo_jax.data.prompt_files import DEEPEST, load_prompts
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError


def test_text_file_gives_a_prompt_per_line(tmp_path):
    """Oracle: the lines written; a form feed inside a prompt does not cut it."""
    path = tmp_path / "train.txt"
    path.write_text("a red apple\r\n  über\x0c two \na cow\n\n", encoding="utf-8")
    prompts = load_prompts(path)
    assert [p.text for p in prompts] == ["a red apple", "über\x0c two", "a cow"]
    assert [p.index for p in prompts] == [0, 1, 2]
    assert all(p.metadata == {} for p in prompts)


def test_jsonl_keeps_the_whole_record(tmp_path):
    """Oracle: the record written."""
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "two cows", "tag": "counting"}\n{"prompt": "x"}\n')
    first, second = load_prompts(str(path))
    assert first == Prompt("two cows", {"prompt": "two cows", "tag": "counting"}, 0)
    assert second.text == "x"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "one\n\nthree\n", r"a\.txt:2: empty prompt"),
        ("a.txt", "\n \n", r"a\.txt: the file is empty"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt"\n', r"a\.jsonl:2: not valid JSON"),
        (
            "a.jsonl",
            '{"text": "x"}\n',
            r'a\.jsonl:1: must be an object with a .*"prompt"',
        ),
        ("a.jsonl", '{"prompt": " "}\n', r'a\.jsonl:1: .*non-empty "prompt"'),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: must be an object"),
        ("a.csv", "x\n", r"a\.csv: must end with \.txt or \.jsonl"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, name, content, message):
    """Oracle: the message names key, file, line and remedy, in one line."""
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=r"^prompts: .*" + message) as caught:
        load_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_and_undecodable_files(tmp_path):
    """Oracle: a UserError, not an OSError or a UnicodeDecodeError."""
    with pytest.raises(UserError, match=r"none\.txt: cannot be read \(No such file"):
        load_prompts(tmp_path / "none.txt")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="must be UTF-8"):
        load_prompts(tmp_path / "bad.txt")


def _record(**more):
    return json.dumps({"prompt": "a cat", **more})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (_record(x=float("nan")), "NaN is no number of JSON"),
        (_record(x=[-float("inf")]), "-Infinity is no number of JSON"),
        ('{"prompt": "a", "x": 1e999}', "1e999 is no number of JSON"),
        ('{"prompt": "a", "x": ' + "9" * 5000 + "}", "has more than 64 bits"),
        ('{"prompt": "a", "x": 18446744073709551616}', "has more than 64 bits"),
        ('{"prompt": "a", "x": ' + "[" * 100_000, f"nested more than {DEEPEST} deep"),
        ('{"x": ' * 100_000, f"nested more than {DEEPEST} deep"),
        (
            _record(x=json.loads("[" * 40 + "]" * 40)),
            f"nested more than {DEEPEST} deep",
        ),
        ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' stands there twice"),
        ('{"prompt": "a", "x": {"n": 1, "n": 1}}', "the key 'n' stands there twice"),
        ('{"prompt": "a", 1: 2}', "not valid JSON"),
        ("{'prompt': 'a'}", "not valid JSON"),
        ('{"prompt": "a"} {"prompt": "b"}', "not valid JSON"),
        ("null", "must be an object"),
        ("3", "must be an object"),
        ('"a cat"', "must be an object"),
        ('["a", "b"]', "must be an object"),
        ('{"prompt": null}', "must be an object"),
        ('{"prompt": ["a"]}', "must be an object"),
        (r'{"prompt": "\u200b\u00a0"}', "no visible character"),
        (r'{"prompt": "a\u0000b"}', "NUL character"),
        (r'{"prompt": "a \ud83d circle"}', r"\\ud83d is half of a character"),
        (_record(note="\udc41"), r"\\udc41 is half of a character"),
        (_record(tag="a", n={"\ud83d": 1}), r"\\ud83d is half of a character"),
        (_record(tag=["colors"]), 'its "tag", the task, must be a text'),
        (_record(tag=3), 'its "tag", the task, must be a text'),
        (_record(tag=None), 'its "tag", the task, must be a text'),
        (_record(tag={}), 'its "tag", the task, must be a text'),
        (_record(resolution="768x"), 'its "resolution" must be 0, pixels of a square'),
        (_record(resolution=[768, 1344]), 'its "resolution" must be 0, pixels'),
        (_record(resolution=None), 'its "resolution" must be 0, pixels'),
        ("", "empty prompt"),
    ],
)
def test_bad_records_are_refused_by_their_line(tmp_path, line, message):
    """Oracle: how the line ends, by hand; the records around it are right."""
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([_record(), line, _record()]))
    with pytest.raises(UserError, match=r"^eval.prompts: .*train\.jsonl:2: ") as caught:
        load_prompts(path, "eval.prompts")
    assert message.replace(r"\\", "\\") in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"a cat\n\xe9t\xe9\n", r"a\.txt:2: must be UTF-8"),
        ("a.jsonl", _record().encode("utf-16"), r"a\.jsonl:1: must be UTF-8"),
        ("a.txt", "a cat".encode("utf-16-le"), r"a\.txt:1: has a NUL"),
        ("a.txt", b"a cat\n\x00\n", r"a\.txt:2: empty prompt"),
        ("a.txt", "a cat\n\u200b\nb".encode(), r"a\.txt:2: empty prompt"),
        ("a.txt", b"\xef\xbb\xbf", "the file is empty"),
        ("a.jsonl", b"\r\n\r\n", "the file is empty"),
        ("a.TXT", b"a cat", "must end with .txt or .jsonl"),
    ],
)
def test_bad_bytes(tmp_path, name, data, message):
    """Oracle: how the line goes on, by hand."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        load_prompts(tmp_path / name)


def test_a_folder_a_pipe_and_what_may_not_be_read(tmp_path):
    """Oracle: the line; a pipe without a writer would be waited for."""
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link.txt").symlink_to(tmp_path / "link.txt")
    for name in ("folder.txt", "pipe.jsonl", "link.txt", "x" * 300 + ".txt", "a\0.txt"):
        with pytest.raises(UserError, match="cannot be read"):
            load_prompts(tmp_path / name)


def test_what_editors_and_other_systems_write_is_read(tmp_path, monkeypatch):
    """Oracle: the same prompts, whatever ends a line or begins the file; ~ is home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    told = [_record(tag="colors", n=2**64 - 1, x=-1.5e300), _record(), _record(y=None)]
    for ends in ("\n", "\r\n", "\r", " \n"):
        data = ends.join(told) + 3 * ends
        for encoding in ("utf-8", "utf-8-sig"):
            (tmp_path / "a.jsonl").write_bytes(data.encode(encoding))
            found = load_prompts("~/a.jsonl")
            assert [dict(p.metadata) for p in found] == [json.loads(t) for t in told]
            assert [p.index for p in found] == [0, 1, 2]
    marked = "\ufeffa cat\n\ufeffa \U0001f600 dog"  # two files in one
    (tmp_path / "a.txt").write_text(marked)
    assert [p.text for p in load_prompts("~/a.txt")] == ["a cat", "a \U0001f600 dog"]


def test_the_deepest_record_that_is_read(tmp_path):
    """Oracle: brackets counted by hand, the record's own with them."""
    for inside, value in ((DEEPEST - 1, "1"), (DEEPEST - 1, ""), (DEEPEST, "")):
        nested = "[" * inside + value + "]" * inside
        (tmp_path / "a.jsonl").write_text(f'{{"prompt": "a", "x": {nested}}}')
        if inside < DEEPEST:
            assert load_prompts(tmp_path / "a.jsonl")[0].text == "a"
        else:
            with pytest.raises(UserError, match="nested more than"):
                load_prompts(tmp_path / "a.jsonl")


def test_a_long_line_is_read(tmp_path):
    """Oracle: its length."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "x" * 10_000_000}))
    assert len(load_prompts(tmp_path / "a.jsonl")[0].text) == 10_000_000
