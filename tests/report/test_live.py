"""The page while a run goes on, the command that writes it, and the one that serves it."""

import threading
import urllib.error
import urllib.request

import numpy as np
import pytest

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.report import live, page, serve
from flowgrpo_jax.runtime.metrics import MetricWriter

IMAGES = {"eval_images": np.zeros((1, 4, 4, 3))}


def test_the_page_is_there_after_the_first_evaluation(tmp_path, monkeypatch):
    """Oracle: by hand; between evaluations it is written when its time has come."""
    (tmp_path / "config.json").write_text('{"num_iterations": 9}')
    clock = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    board = live.LivePage(tmp_path, "python -m <it>")
    path = tmp_path / page.FILE
    with MetricWriter(tmp_path, 0, tensorboard=False, boards=[board]) as writer:
        writer.write(0, {"eval_reward_avg": 0.5}, kind="eval")
        assert not path.exists()
        writer.images(0, IMAGES)
        assert "python -m &lt;it&gt;" in path.read_text()
        writer.write(0, {"reward_avg": 0.5})
        assert "1 of 9 iterations" not in path.read_text()
        clock[0] += 31
        writer.write(1, {"reward_avg": 0.5})
        assert "2 of 9 iterations" in path.read_text()


def test_a_page_that_fails_ends_no_run(tmp_path, monkeypatch, capfd):
    """Oracle: the warning, once, with where it came from."""
    board = live.LivePage(tmp_path, "")

    def broken(*_):
        raise RuntimeError("my bug")

    monkeypatch.setattr(page, "render_page", broken)
    for iteration in range(3):
        board.write_images(iteration, IMAGES)
    told = capfd.readouterr().err
    assert told.count("warning: report.html cannot be written") == 1
    assert told.count("RuntimeError: my bug") == 1 and "render_page" in told


def get(url, host=None):
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_what_is_served(tmp_path):
    """Oracle: by hand: the page and what it links to, for this machine's names alone."""
    config, rows = tmp_path / "config.json", tmp_path / "metrics.jsonl"
    config.write_text('{"num_iterations": 9}')
    rows.write_text('{"iteration": 0, "kind": "train", "loss": 0.5}\n')
    with serve.Server([tmp_path], 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        url = server.url
        status, text = get(url)
        version = get(f"{url}version")[1]
        assert status == 200 and f'data-version="{version}"' in text
        assert get(f"{url}metrics.jsonl") == (200, rows.read_text())
        for path in ("config.json", "../config.json", "samples/../config.json", "x"):
            assert get(f"{url}{path}")[0] == 404, path
        assert get(url, "elsewhere.example")[0] == 403
        assert get(url, "localhost:1")[0] == 200
        rows.write_text(rows.read_text() * 2)
        assert get(f"{url}version")[1] != version
        config.unlink()
        status, text = get(url)
        assert status == 503 and "holds no config.json" in text
        with pytest.raises(UserError, match=r"--port: \d+: .*: give another one"):
            serve.Server([tmp_path], server.server_address[1])
        server.shutdown()
