"""The sample command: files, noise, warnings, wrong requests, searches."""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowgrpo_jax import assemble, cli, sample
from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import variants
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.inference import pipeline, sampling
from flowgrpo_jax.inference.search import methods, noise_optimization
from flowgrpo_jax.worlds.sprites import model as sprites_model
from tests.tiny import SIZE

RED = "a photo of a red circle"
PRINTED = r"{}: (\S+) (-?[\d.]+) plain, (-?[\d.]+) found, (\d+) network evaluations"


@pytest.fixture
def draw(monkeypatch, weights_file, tmp_path):
    """Run the command on the tiny model as the embedded one: its folder."""

    def command(*arguments, output="out"):
        folder = tmp_path / output
        argv = ["sample", "--num_steps=2", "--guidance_scale=1"]
        argv += [f"--output={folder}"] * bool(output) + [*map(str, arguments)]
        if not any(word.startswith(("--search", "--num_images")) for word in argv):
            argv += ["--num_images=2"]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sprites_model, "WEIGHTS", Path(weights_file))
        module = importlib.reload(sample)
        cli.parse(module.FLAGS)
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
    last = f"4 images of the base model in {both}, all in {both / 'grid.png'}\n"
    assert captured.out == last
    (tmp_path / "one.txt").write_text(f"{RED}\n")
    one = draw(f"--prompts_file={tmp_path / 'one.txt'}", output="one")
    first, second = names[:2]
    np.testing.assert_array_equal(pixels(both / first), pixels(one / first))
    assert (pixels(one / first) != pixels(one / second)).any()


def test_options_fall_back_to_the_config():
    """Oracle: the values given; None leaves the config's."""
    config = configs.make(eval__guidance_scale=3.0)
    changed = variants.with_options(config, 5, None, 7)
    assert changed.eval.seed == 5 and changed.eval.guidance_scale == 3.0
    assert changed.sample.eval_num_steps == 7 and config.eval.seed == 0
    with pytest.raises(UserError, match=r"^sample\.eval_num_steps: 0: "):
        variants.with_options(config, 0, None, 0)


def test_unknown_words_are_found():
    """Oracle: by hand; stop words, case and punctuation do not matter."""
    tokenizer = sprites_model.make_model(SIZE).tokenizer
    assert sampling.unknown_words(tokenizer, "A photo of two red circles, left!") == []
    assert sampling.unknown_words(tokenizer, "a Pink dog and a pink cat") == [
        "pink",
        "dog",
        "cat",
    ]


@pytest.mark.parametrize(
    "arguments, line",
    [
        ((), "--prompt: missing"),
        (("--prompt= ",), "--prompt: ' ': empty prompt"),
        (
            ("--prompt=a \udcff circle",),
            "--prompt: 'a \\udcff circle': \\udcff is half of",
        ),
        (
            ("--prompt=a circle", "--negative_prompt=\udcff"),
            "--negative_prompt: ",
        ),
        (("--prompts_file=no.txt",), "--prompts_file: no.txt: cannot be read"),
        ((f"--prompt={RED}", "--checkpoint=3"), "--checkpoint: 3: give its --workdir"),
        ((f"--prompt={RED}", "--weights=ema"), "--weights: ema: give its --workdir"),
        ((f"--prompt={RED}", "--weights=best"), "--weights: best: "),
        ((f"--prompt={RED}", "--seed=-1"), "--seed: -1: must be at least 0"),
        ((f"--prompt={RED}", "--num_steps=0"), "--num_steps: 0: must be at least 1"),
        ((f"--prompt={RED}", "--num_images=0"), "--num_images: 0: "),
        ((f"--prompt={RED}", "--workdir=no"), "workdir: no: holds no config.json"),
        (("--search=best", f"--prompt={RED}"), "--search: best: "),
        (("--budget=9", f"--prompt={RED}"), "--budget: 9: needs --search"),
        (("--keep=0.5", f"--prompt={RED}"), "--keep: 0.5: needs --search"),
        (
            ("--search=rbf", "--budget=1", f"--prompt={RED}"),
            "--budget: 1: must be at least 2, the evaluations of one image",
        ),
        (
            ("--search=rbf", "--num_steps=1", f"--prompt={RED}"),
            "--num_steps: 1: --search=rbf needs at least 2",
        ),
        (
            ("--search=best_of_n", "--num_images=2", f"--prompt={RED}"),
            "--num_images: 2: --search=best_of_n decides by itself",
        ),
        (
            ("--search=cfg_rejection", f"--prompt={RED}"),
            "--guidance_scale: 1.0: --search=cfg_rejection compares",
        ),
        (
            ("--search=cfg_rejection", "--guidance_scale=2", f"--prompt={RED}"),
            "--judged_steps: 10: must be below the 2 steps",
        ),
        (
            (
                "--search=cfg_rejection",
                "--guidance_scale=2",
                "--judged_steps=1",
                "--keep=1.5",
                f"--prompt={RED}",
            ),
            "--keep: 1.5: must be above 0, at most 1",
        ),
        (
            ("--search=noise_optimization", f"--prompt={RED}"),
            "--reward: geneval: has no gradient, which --search=noise_optimization "
            "needs: must be one of brightness, darkness",
        ),
        (
            ("--search=rbf", "--prompt=a red dog"),
            "reward: geneval: prompt 'a red dog' has no GenEval record",
        ),
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
        pipeline.packing, "collect", lambda images, _: np.full_like(images, np.nan)
    )
    with pytest.raises(UserError, match="^model: sprites: its images are not finite"):
        draw(f"--prompt={RED}")


def test_the_flags_name_all_searches_and_rewards():
    """Oracle: the tables of the package."""
    flags = importlib.reload(sample).FLAGS
    assert flags["search"].parser.enum_values == list(methods.METHODS)
    assert flags["reward"].parser.enum_values == list(noise_optimization.REWARDS)


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_search_tells_scores_and_price(draw, capsys, method):
    """Oracle: the form of the line, and the budget."""
    arguments = ["--guidance_scale=2", "--judged_steps=1", "--budget=6"]
    arguments += ["--reward=darkness", f"--prompt={RED}", f"--search={method}"]
    folder = draw(*arguments)
    line, last, _ = capsys.readouterr().out.split("\n")
    name, before, after, price = re.fullmatch(PRINTED.format(RED), line).groups()
    assert name == "darkness" and int(price) <= 6
    if method in ("best_of_n", "noise_optimization"):  # the plain image takes part
        assert float(after) >= float(before)
    where = f"{folder}, all in {folder / 'grid.png'}"
    assert last == f"1 images of the base model in {where}"
    assert (folder / "000_a-photo-of-a-red-circle_0.png").is_file()


def test_images_go_to_a_new_folder(draw, monkeypatch, tmp_path, capsys):
    """Oracle: the names, by hand; what is there stays, and is told where it would not."""
    monkeypatch.chdir(tmp_path)
    drawn = tmp_path / "drawn"
    for number in range(2):
        draw(f"--prompt={RED}", "--num_images=1", f"--seed={number}", output="")
        told = capsys.readouterr().out.split()[-1]
        assert told == f"drawn/{number:03d}/grid.png" and (tmp_path / told).is_file()
    first, second = (pixels(drawn / f"{n:03d}" / "grid.png") for n in range(2))
    assert (first != second).any()
    (drawn / "notes").mkdir()
    (drawn / "041").write_text("a file")
    assert sample.new_folder(drawn).name == "042"

    draw(f"--prompt={RED}", "--num_images=1")
    assert "warning: --output" not in capsys.readouterr().err
    folder = draw(f"--prompt={RED}", "--num_images=1")
    line = f"warning: --output: {folder}: holds 2 images: those of the same name are "
    assert capsys.readouterr().err.startswith(line)


def test_a_search_of_one_image_is_the_plain_command(draw):
    """Oracle: the file of the command without a search, to one level of 255."""
    name = "001_a-photo-of-a-red-circle_0.png"
    arguments = ["--prompt=two rings", f"--prompt={RED}", "--seed=5"]
    plain = draw(*arguments, output="plain")
    found = draw(*arguments, "--search=best_of_n", "--reward=brightness", "--budget=3")
    assert np.abs(pixels(plain / name) - pixels(found / name)).max() <= 1


def test_the_config_s_reward_judges_prompts_of_its_sets(draw, capsys, tmp_path):
    """Oracle: the record in the prompt set, and one that the user's file brings."""
    draw("--search=best_of_n", "--budget=4", f"--prompt={RED}")
    assert capsys.readouterr().out.startswith(f"{RED}: geneval ")
    record = {"prompt": "mine", "tag": "single_object"}
    record["include"] = [{"class": "circle", "count": 1}]
    (tmp_path / "mine.jsonl").write_text(json.dumps(record))
    draw("--search=rbf", "--budget=4", f"--prompts_file={tmp_path / 'mine.jsonl'}")
    assert re.match(PRINTED.format("mine"), capsys.readouterr().out)


def test_cfg_rejection_needs_no_reward(draw, capsys):
    """Oracle: a prompt that no reward can judge; by hand, 2 + 1 <= 3 < 4 + 1."""
    flags = ["--search=cfg_rejection", "--guidance_scale=2", "--judged_steps=1"]
    draw(*flags, "--budget=3", "--prompt=rings everywhere")
    out = capsys.readouterr().out
    assert out.startswith("rings everywhere: 3 network evaluations\n")


def test_metadata_is_that_of_the_same_text():
    """Oracle: the prompt set's own records; what a prompt brings itself stays."""
    own = Prompt(RED, {"tag": "colors"})
    found = assemble.with_metadata(configs.make(), [Prompt(RED), own, Prompt("no")])
    assert found[0].metadata["include"] == [
        {"class": "circle", "count": 1, "color": "red"}
    ]
    assert found[1:] == [own, Prompt("no")]


def test_damaged_weights_are_one_line_in_a_search(draw, monkeypatch):
    """Oracle: the line, by hand."""
    monkeypatch.setattr(
        "flowgrpo_jax.inference.search.setting.decode",
        lambda setting, latents: np.full((1, 24, 24, 3), np.nan),
    )
    with pytest.raises(UserError, match="^model: sprites: its images are not finite"):
        draw(f"--prompt={RED}", "--search=best_of_n", "--reward=darkness")
