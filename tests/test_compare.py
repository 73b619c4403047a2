"""The compare command: the page of a run of the tiny model, and wrong requests."""

import importlib
import json
import re
import sys

import numpy as np
import pytest

from flowgrpo_jax import assemble, cli, compare
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rl import update as rl_update
from flowgrpo_jax.runtime.checkpoint import Checkpointer
from flowgrpo_jax.runtime.workdir import open_workdir
from tests.tiny_run import reward_spread, tiny_config, use

TEXTS = ["a photo of a ring", "a photo of <b>two</b> circles", "a photo of a star"]


@pytest.fixture(scope="module")
def workdir(weights_file, tmp_path_factory):
    """A run whose newest checkpoint has weights a little off, and the first one none.

    In it the learner alone has moved.
    """
    path = tmp_path_factory.mktemp("run")
    prompts = path.parent / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in TEXTS))
    config = tiny_config(weights_file, eval__prompts=str(prompts))
    model, loaded = assemble.load_model(config)
    trainable = assemble.trainable_part(config, model, loaded)
    moved = {"transformer": {}}
    moved["transformer"] = {
        name: {k: v + np.float32(0.1) for k, v in layer.items()}
        if name == "proj_out"
        else layer
        for name, layer in trainable["transformer"].items()
    }
    open_workdir(path, config.to_dict()).close()
    with Checkpointer(path / "checkpoints") as checkpoints:
        checkpoints.save(1, rl_update.TrainState(moved, {}, trainable, np.int32(1)))
        checkpoints.save(2, rl_update.TrainState(moved, {}, moved, np.int32(2)))
    return path


@pytest.fixture
def run(workdir, monkeypatch):
    use(monkeypatch, reward_spread)

    def command(*arguments):
        monkeypatch.setattr(
            sys, "argv", ["compare", f"--workdir={workdir}", *arguments]
        )
        module = importlib.reload(compare)
        cli.parse(module.FLAGS)
        module.main()
        return (workdir / "compare.html").read_text()

    return command


def test_the_page_has_pairs_and_their_rewards(run, capsys):
    """Oracle: counting; the printed means; nothing is loaded from elsewhere."""
    page = run("--num_images=2", "--max_prompts=2")
    out = capsys.readouterr().out
    assert page.count("<img") == 2 * 2 * 2 == page.count("data:image/png;base64,")
    assert TEXTS[0] in page and "a photo of a star" in page and "<b>two" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # no report is there
    assert "tuned: the EMA after 2 iterations" in page
    assert "flowgrpo_jax.compare --workdir=" in page
    assert 'class="sheet pixels"' in page  # 24 pixels are not blurred
    assert "are the same in both" not in page + out and "avg" not in page + out
    assert "the base model and the EMA after 2 iterations, in " in out
    name, base, tuned = re.match(r"(\w+): (\S+) base, (\S+) tuned, hi", out).groups()
    assert name == "geneval" and base != tuned
    assert f"<td>{base}</td><td>{tuned}</td>" in page
    shown = [float(x) for x in re.findall(r'class="soft">geneval: (\S+?),', page)]
    assert len(shown) == 8 and np.mean(shown[:2] + shown[4:6]) == pytest.approx(
        float(base), rel=1e-3
    )


def test_the_base_model_may_have_moved(run, weights_file, tmp_path):
    """Oracle: an invariance; and the line for another kind of model, by hand."""
    flags = ("--num_images=1", "--max_prompts=1", "--seed=3")
    before = run(*flags)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(open(weights_file, "rb").read())
    after = run(*flags, f"--model={copy}")
    assert after.replace(f" --model={copy}", "") == before
    with pytest.raises(UserError, match="--model: sd3-medium: is not what the run"):
        run("--model=sd3-medium")


def test_what_is_the_base_model_is_said_to_be(run, capsys):
    """Oracle: by hand; the EMA of the first checkpoint has not moved, the learner has."""
    flags = ("--num_images=2", "--max_prompts=1", "--checkpoint=1")
    page = run(*flags)
    out, err = capsys.readouterr()
    line = "all 2 images are the same in both, to the last pixel"
    assert line in out and line in page and "higher in 0%" in out
    assert err.startswith(
        "warning: nothing differs from the base model: the EMA after 1"
    )
    page = run(*flags, "--weights=learner")
    out, err = capsys.readouterr()
    assert "are the same" not in out + page and not err
    assert "the learner after 1 iterations" in out and "the learner after 1" in page


def test_the_page_leads_to_the_report(run, workdir, tmp_path):
    """Oracle: the path, by hand, from where the page is; captions keep apart."""
    (workdir / "report.html").write_text("there")
    try:
        page = run("--num_images=1", "--max_prompts=1")
        assert '<a href="report.html">' in page
        run("--num_images=1", "--max_prompts=1", f"--output={tmp_path / 'page.html'}")
        (link,) = re.findall('<a href="(.*?)"', (tmp_path / "page.html").read_text())
        assert (tmp_path / link).resolve() == (workdir / "report.html").resolve()
    finally:
        (workdir / "report.html").unlink()
    caption = re.search(r"figcaption \{([^}]*)\}", page)[1]
    assert "gap: 0 10px" in caption and "flex-wrap: wrap" in caption


def test_images_that_are_the_same_are_counted():
    """Oracle: by hand; what no PNG can show is no difference."""
    base = np.full((2, 3, 4, 4, 3), 0.5)
    tuned = base.copy()
    assert compare.same_images((base, {}), (tuned, {})).startswith("all 6 images are")
    tuned[0, 0, 0, 0, 0] += 1e-5
    assert compare.same_images((base, {}), (tuned, {})).startswith("all 6 images are")
    tuned[0, 0, 0, 0, 0] += 1 / 255
    assert compare.same_images((base, {}), (tuned, {})).startswith("5 of 6 images are")
    tuned[...] = 0.6
    assert compare.same_images((base, {}), (tuned, {})) == ""


def test_prompts_are_drawn_evenly():
    """By hand."""
    prompts = [Prompt(text) for text in "abcdefg"]
    assert "".join(p.text for p in compare.thinned(prompts, 3)) == "adg"
    assert compare.thinned(prompts[:2], 16) == prompts[:2]


def test_the_summary_of_a_reward():
    """Oracle: by hand; ties are no gain."""
    images = np.zeros((1, 4, 1, 1, 3))
    base = images, {"ocr": np.array([[0.0, 1.0, 2.0, 3.0]])}
    tuned = images, {"ocr": np.array([[1.0, 2.0, 3.0, 3.0]])}
    assert compare.summary(base, tuned) == [("ocr", 1.5, 2.25, 0.75)]
