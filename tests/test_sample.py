"""The sample command: files, noise, warnings, wrong requests."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowgrpo_jax import commands, pipeline, sample
from flowgrpo_jax import config as configs
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.sprites import model as sprites_model
from tests.tiny import SIZE

RED = "a photo of a red circle"


@pytest.fixture
def draw(monkeypatch, weights_file, tmp_path):
    """Run the command on the tiny model as the embedded one: its folder."""

    def command(*arguments, output="out"):
        folder = tmp_path / output
        argv = ["sample", "--num_images=2", "--num_steps=2", "--guidance_scale=1"]
        argv += [f"--output={folder}", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sprites_model, "WEIGHTS", Path(weights_file))
        module = importlib.reload(sample)
        commands.parse(module.FLAGS)
        module.main()
        return folder

    return command


def pixels(path):
    return np.asarray(Image.open(path), np.int16)


def test_images_have_stable_names_and_fixed_noise(draw, capsys, tmp_path):
    """Oracle: an invariance; the first prompt's images do not know of the second."""
    both = draw(f"--prompt={RED}", "--prompt=two zebras and a ring")
    names = sorted(path.name for path in both.iterdir())
    assert names == [
        "000_a-photo-of-a-red-circle_0.png",
        "000_a-photo-of-a-red-circle_1.png",
        "001_two-zebras-and-a-ring_0.png",
        "001_two-zebras-and-a-ring_1.png",
        "grid.png",
    ]
    captured = capsys.readouterr()
    assert captured.err == ("warning: two zebras and a ring: unknown words: zebras\n")
    assert captured.out.startswith("4 images in ")
    (tmp_path / "one.txt").write_text(f"{RED}\n")
    one = draw(f"--prompts_file={tmp_path / 'one.txt'}", output="one")
    first, second = names[:2]
    np.testing.assert_array_equal(pixels(both / first), pixels(one / first))
    assert (pixels(one / first) != pixels(one / second)).any()


def test_options_fall_back_to_the_config():
    """Oracle: the values given; None leaves the config's."""
    config = configs.make(eval__guidance_scale=3.0)
    changed = sample.with_options(config, 5, None, 7)
    assert changed.eval.seed == 5 and changed.eval.guidance_scale == 3.0
    assert changed.sample.eval_num_steps == 7 and config.eval.seed == 0
    with pytest.raises(UserError, match=r"^sample\.eval_num_steps: 0: "):
        sample.with_options(config, 0, None, 0)


def test_unknown_words_are_found():
    """Oracle: by hand; stop words, case and punctuation do not matter."""
    tokenizer = sprites_model.make_model(SIZE).tokenizer
    assert sample.unknown_words(tokenizer, "A photo of two red circles, left!") == []
    assert sample.unknown_words(tokenizer, "a Pink dog and a pink cat") == [
        "pink",
        "dog",
        "cat",
    ]


@pytest.mark.parametrize(
    "arguments, line",
    [
        ((), "--prompt: missing"),
        (("--prompt= ",), "--prompt: '': an empty prompt"),
        (("--prompts_file=no.txt",), "prompts: no.txt: cannot be read"),
        ((f"--prompt={RED}", "--checkpoint=3"), "--checkpoint: 3: give its --workdir"),
        ((f"--prompt={RED}", "--num_images=0"), "flag --num_images=0: "),
        ((f"--prompt={RED}", "--workdir=no"), "workdir: no: holds no config.json"),
    ],
)
def test_wrong_requests_are_one_line(draw, arguments, line, tmp_path):
    """Oracle: how the lines begin, by hand; no folder is made."""
    with pytest.raises(UserError) as caught:
        draw(*arguments)
    assert str(caught.value).startswith(line)
    assert not (tmp_path / "out").exists()


def test_damaged_weights_are_one_line(draw, monkeypatch):
    """Oracle: the line, by hand: weights that give no numbers draw nothing."""
    monkeypatch.setattr(
        pipeline.layouts, "collect", lambda images, _: np.full_like(images, np.nan)
    )
    with pytest.raises(UserError, match="^model: sprites: its images are not finite"):
        draw(f"--prompt={RED}")
