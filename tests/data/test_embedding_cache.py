"""The cache of prompt embeddings: keys, kills, damage, other processes."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import ml_dtypes
import numpy as np
import pytest

from flowgrpo_jax.data import embedding_cache
from flowgrpo_jax.data.embedding_cache import EmbeddingCache, Field
from flowgrpo_jax.errors import UserError

FIELDS = {
    "context": Field((3, 4), np.dtype(ml_dtypes.bfloat16)),
    "pooled": Field((5,), np.dtype(np.float32)),
}


def arrays(count, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal((count, *field.shape)).astype(field.dtype)
        for name, field in FIELDS.items()
    }


def filled(folder, texts, **key):
    cache = EmbeddingCache(folder, key, FIELDS)
    cache.add(texts, arrays(len(texts)))
    return cache


def test_what_was_added_comes_back(tmp_path):
    """Oracle: an invariance; bit for bit, in any order, in a process that comes later."""
    texts = ["a red circle", "", "ein blauer Kreis, größer"]
    cache, given = filled(tmp_path, texts), arrays(3)
    for reader in (cache, EmbeddingCache(tmp_path, {}, FIELDS)):
        assert reader.missing([*texts, "new", "new"]) == ["new"]
        found = reader.rows([texts[2], texts[0], texts[2]])
        for name, values in given.items():
            assert found[name].dtype == values.dtype
            np.testing.assert_array_equal(found[name], values[[2, 0, 2]])
    with pytest.raises(KeyError):
        cache.rows(["new"])


def test_another_key_is_another_cache(tmp_path):
    """Oracle: the contract; encoders, lengths or types that differ share nothing."""
    filled(tmp_path, ["a"], encoders="x", length=128)
    for key in ({"encoders": "y", "length": 128}, {"encoders": "x", "length": 77}):
        assert EmbeddingCache(tmp_path, key, FIELDS).missing(["a"]) == ["a"]
    other = FIELDS | {"pooled": Field((5,), np.dtype(np.float16))}
    key = {"encoders": "x", "length": 128}
    assert EmbeddingCache(tmp_path, key, other).missing(["a"]) == ["a"]
    assert EmbeddingCache(tmp_path, key, FIELDS).missing(["a"]) == []


def test_a_killed_writer(tmp_path):
    """Oracle: the contract; a process killed while it writes leaves what it added."""
    program = textwrap.dedent(f"""
        import sys
        import numpy as np
        from flowgrpo_jax.data.embedding_cache import EmbeddingCache, Field
        cache = EmbeddingCache(
            {str(tmp_path)!r}, {{}}, {{"x": Field((99,), np.dtype(np.float32))}}
        )
        with cache.exclusively():
            for number in range(10**9):
                cache.add([str(number)], {{"x": np.full((1, 99), number)}})
                print(number, flush=True)
    """)
    writer = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    )
    for line in writer.stdout:
        if int(line) == 20:
            break
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    cache = EmbeddingCache(tmp_path, {}, {"x": Field((99,), np.dtype(np.float32))})
    texts = [str(number) for number in range(21)]
    assert cache.missing(texts) == []
    np.testing.assert_array_equal(cache.rows(texts)["x"][:, 5], np.arange(21))
    with cache.exclusively():  # the lock went with its holder
        cache.add(["more"], {"x": np.ones((1, 99))})
    assert cache.missing(["more"]) == []


def test_a_damaged_record_is_named(tmp_path):
    """Oracle: the line, by hand; one flipped bit is not taken for an embedding."""
    cache, record = filled(tmp_path, ["a", "b"]), arrays(2)["pooled"][1].tobytes()
    data = cache.path.read_bytes()
    assert data.count(record) == 1
    cache.path.write_bytes(data.replace(record, bytes([record[0] ^ 1]) + record[1:]))
    again = EmbeddingCache(tmp_path, {}, FIELDS)
    again.rows(["a"])
    with pytest.raises(UserError, match="embedding of 'b' is damaged: delete the file"):
        again.rows(["b"])


@pytest.mark.parametrize("damage", [b"dear diary\n" * 999, b""])
def test_a_file_of_something_else_is_one_line(tmp_path, damage):
    """Oracle: the line, by hand; a file that was emptied is an empty cache."""
    cache = filled(tmp_path, ["a"])
    cache.path.write_bytes(damage)
    if damage:
        with pytest.raises(UserError, match="embedding_cache: .*: file is not a data"):
            EmbeddingCache(tmp_path, {}, FIELDS)
    else:
        assert EmbeddingCache(tmp_path, {}, FIELDS).missing(["a"]) == ["a"]


def test_a_disk_that_is_full_keeps_what_was_there(tmp_path, full_disk):
    """Oracle: the line, by hand, and the first embedding, bit for bit."""
    cache = filled(tmp_path, ["a"])
    with (
        full_disk(),
        pytest.raises(
            UserError, match="sqlite: .* full: a prompt takes 0.0 MB: free some space"
        ),
    ):
        cache.add([str(number) for number in range(2000)], arrays(2000))
    assert cache.missing(["a", "0", "1999"]) == ["0", "1999"]
    np.testing.assert_array_equal(cache.rows(["a"])["pooled"], arrays(1)["pooled"])


def test_two_that_begin_together_encode_once(tmp_path):
    """Oracle: an order; the second is let in when the first has finished."""
    first, second = (EmbeddingCache(tmp_path, {}, FIELDS) for _ in range(2))
    seen = []

    def wait():
        with second.exclusively():
            seen.append(second.missing(["a"]))

    thread = threading.Thread(target=wait)
    with first.exclusively():
        thread.start()
        first.add(["a"], arrays(1))
        assert not seen
    thread.join()
    assert seen == [[]]


def test_a_folder_that_cannot_be(tmp_path):
    """Oracle: the line, by hand."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="embedding_cache: .*file/.*: name a folder"):
        EmbeddingCache(tmp_path / "file", {}, FIELDS)
    with pytest.raises(UserError, match="embedding_cache: .*file: .*: name a folder"):
        embedding_cache.fingerprint([tmp_path / "file"], tmp_path / "file")


def test_a_cache_that_goes_away_is_one_line(tmp_path):
    """Oracle: the line, by hand."""
    cache = EmbeddingCache(tmp_path, {}, FIELDS)
    cache.path.unlink()
    with pytest.raises(UserError, match="embedding_cache: .*sqlite: No such file"):
        cache.missing(["a"])
    with pytest.raises(UserError, match="embedding_cache: "):
        cache.add(["a"], arrays(1))


@pytest.mark.parametrize("text", ["[", "3", "[1]", "[" * 100_000, ""])
def test_fingerprints_of_anything_are_made_again(tmp_path, text):
    """Oracle: an invariance."""
    (tmp_path / "file").write_text("x")
    right = embedding_cache.fingerprint([tmp_path / "file"], tmp_path)
    (tmp_path / "fingerprints.json").write_text(text)
    assert embedding_cache.fingerprint([tmp_path / "file"], tmp_path) == right


def test_home_is_the_home_folder(tmp_path, monkeypatch):
    """Oracle: where the file is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert EmbeddingCache("~/x", {}, FIELDS).path.parent == tmp_path / "x"


def test_fingerprint(tmp_path):
    """Oracle: the contract; contents and names count, unchanged files are not read."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"abc")
    two.write_bytes(b"def")
    first = embedding_cache.fingerprint([one, two], tmp_path)
    assert embedding_cache.fingerprint([one, two], tmp_path) == first
    assert embedding_cache.fingerprint([two, one], tmp_path) != first
    two.write_bytes(b"dEf")
    assert embedding_cache.fingerprint([one, two], tmp_path) != first
    two.write_bytes(b"def")
    assert embedding_cache.fingerprint([one, two], tmp_path) == first
    hasher = embedding_cache.hashlib
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hasher, "file_digest", None)
        assert embedding_cache.fingerprint([one, two], tmp_path) == first
