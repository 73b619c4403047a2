"""Samples of a run, made again, on a flow of three numbers."""

import dataclasses
import hashlib
import importlib
import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks.replay import is_same, recorded
from flowgrpo_jax import cli
from flowgrpo_jax import config as configs
from flowgrpo_jax import train as trainer
from flowgrpo_jax.assemble import replay, rewards
from flowgrpo_jax.assemble import run as assembled
from flowgrpo_jax.assemble.replay import Place
from flowgrpo_jax.errors import UserError
from tests import toy
from tests.tiny_run import reward_spread, use

RECORDS = [
    {"tag": "single_object", "include": [{"class": name, "count": 1}]}
    | {"prompt": f"a photo of a {name}"}
    for name in ("circle", "ring", "square", "cross")
]


MODEL = dataclasses.replace(toy.MODEL, latent_shape=(1, 1, 3))
VARIABLES = {"transformer": {"mean": np.zeros(3, np.float32)}, "text": {}}


@pytest.fixture(scope="module", autouse=True)
def small():
    """The toy in place of the embedded model."""
    with pytest.MonkeyPatch.context() as patch:
        use(patch, reward_spread)
        patch.setattr(assembled, "starting_model", lambda *_: (MODEL, VARIABLES))
        patch.setattr(assembled, "save_result", lambda *_: None)
        patch.setattr(rewards, "world_of", lambda config: None)
        yield


@pytest.fixture(scope="module")
def ran(small, tmp_path_factory):
    """(workdir, what its iterations had): two on two devices, then two on one."""
    folder = tmp_path_factory.mktemp("replay")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(one) + "\n" for one in RECORDS))
    had = {}
    with recorded(had):
        for iterations, devices in ((2, 2), (5, 1)):
            config = configs.make(
                prompts=str(prompts),
                eval__prompts=str(prompts),
                eval__every=0,
                eval__sde=False,
                eval__images_per_task=1,
                eval__final_images_per_task=1,
                eval__guidance_scale=1.0,
                num_iterations=iterations,
                prompts_per_iteration=2,
                group_size=4,
                microbatch=4,
                mesh={"data": devices},
                monitors=(),
                sample__num_steps=3,
                sample__eval_num_steps=2,
                sample__guidance_scale=1.0,
                checkpoint__every=2,
                checkpoint__keep=9,
                train__use_lora=False,
                log__tensorboard=False,
            )
            assert trainer.train(config, folder / "run")
    return folder / "run", had


def assert_had(sample, had, place):
    """The picture, the rewards and the actions are those of the run, bit for bit."""
    assert is_same(sample, had, place, group=4)
    assert sum(step.trained for step in sample.steps) == 2
    assert not sample.unequal


def digests(folder):
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def command(monkeypatch, *flags):
    """The exit code of the command with these flags."""
    module = importlib.reload(importlib.import_module("flowgrpo_jax.replay"))
    monkeypatch.setattr(sys, "argv", ["replay", *flags])
    cli.parse(module.FLAGS)
    return module.main()


def test_iterations_between_run_again(ran):
    """Oracle: what the run had, on the mesh that it kept; its files are as they were."""
    workdir, had = ran
    before, told = digests(workdir), []
    place = Place(1, 1, 3)
    replayed = replay.replay(workdir, place, tell=told.append)
    assert_had(replayed.sample, had[1], place)
    assert (replayed.checkpoint, replayed.differs) == (0, False)
    assert [(one.iteration, one.equal > 15) for one in replayed.checked] == [
        (0, True),
        (1, True),
    ]
    assert told[0] == "from the beginning: 1 iteration to run again before it"
    assert told[2].endswith("numbers of its row are equal")
    assert digests(workdir) == before


def test_the_command_after_a_resume(ran, tmp_path, monkeypatch, capsys):
    """Oracle: what the run had, read from the files; numbers by hand from its rows."""
    workdir, had = ran
    flags = ["--iteration=3", "--prompt=1", "--member=2", f"--output={tmp_path}"]
    assert command(monkeypatch, f"--workdir={workdir}", *flags) == 0
    out = capsys.readouterr().out
    assert "from the checkpoint of iteration 2: 1 iteration to run again" in out
    assert "sampled alone: the same bits as in its iteration" in out
    told = json.loads((tmp_path / "sample.json").read_text())
    assert [one["kind"] for one in told["steps"]] == [
        "trained",
        "trained",
        "stochastic",
    ]
    assert not told["differs"] and told["checkpoint"] == 2
    mine = had[3]["images"][had[3]["numbers"].tolist().index(4 + 2)]
    with np.load(tmp_path / "sample.npz") as arrays:
        np.testing.assert_array_equal(arrays["pictures"][-1], mine)
        assert arrays["log_probs"][0] in had[3]["log_prob"]
        assert arrays["latents"].shape[0] == 4
    rewards = had[3]["rewards"]["avg"][4:]
    assert told["group"] == rewards.tolist()
    best_first = np.argsort(-rewards).tolist()
    assert (told["steps"][0]["advantage"] > 0) is (best_first.index(2) < 2)
    picture = np.asarray(Image.open(tmp_path / "image.png"))
    np.testing.assert_array_equal(picture, np.round(mine.clip(0, 1) * 255))
    sheet = Image.open(tmp_path / "steps.png")
    assert sheet.width >= 4 * 150


def test_another_mesh_and_a_row_that_is_not_the_same(ran, tmp_path):
    """Oracle: what the run had; a number of its row is changed by hand."""
    workdir, had = ran
    copy = shutil.copytree(workdir, tmp_path / "copy")
    rows = [json.loads(x) for x in (copy / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if (row["iteration"], row["kind"]) == (4, "train"):
            row["reward_avg"] += 1e-9
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (copy / "metrics.jsonl").write_text(text)
    place = Place(4, 0, 1)
    replayed = replay.replay(copy, place, mesh={"data": 2}, tell=lambda line: None)
    assert_had(replayed.sample, had[4], place)
    (own,) = replayed.checked
    assert [*own.differing] == ["reward_avg"] and replayed.differs
    assert "DIFFERS in 1 of" in replay.line_of(own)
    # What an update adds up in another order says nothing of the sample before it.
    assert set(own.learned) <= {"loss", "grad_norm", "kl_loss", "approx_kl", "ratio"}


def test_another_mesh_leaves_the_sums_exact():
    """Oracle: by hand; where gradients were exact, they are on any mesh."""
    config = configs.make(mesh__exact=True)
    replay._choose_mesh(config, {"data": 2})
    assert config.mesh.to_dict() == {"data": 2, "fsdp": 1, "exact": True}
    replay._choose_mesh(config, None)  # a run that did not keep its mesh


@pytest.mark.parametrize(
    "flags, line",
    [
        ({"iteration": 5}, "--iteration: 5: the run has done 5: must be one of 0 to 4"),
        ({"iteration": -1}, "--iteration: -1: the run has done 5"),
        ({"prompt": 2}, "--prompt: 2: an iteration has 2: must be one of 0 to 1"),
        ({"member": 4}, "--member: 4: a prompt has 4 images: must be one of 0 to 3"),
        ({"checkpoint": 3}, "--checkpoint: 3: must be one at or before iteration 3: "),
        ({"mesh": "data=99"}, "--mesh: mesh: .* give another one, such as --mesh=data"),
        ({"mesh": "two"}, "--mesh: two: must be axes with their sizes"),
        ({"workdir": "nowhere"}, "workdir: .*nowhere: holds no config.json"),
    ],
)
def test_wrong_places_are_one_line(flags, line, ran, monkeypatch):
    """Oracle: the lines, by hand."""
    given = {"workdir": ran[0], "iteration": 3} | flags
    with pytest.raises(UserError, match=f"^{line}"):
        command(monkeypatch, *(f"--{name}={value}" for name, value in given.items()))


def test_no_checkpoint_old_enough(ran, tmp_path):
    """Oracle: the line, by hand; the beginning is not taken unasked for so many."""
    copy = shutil.copytree(ran[0], tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / "2")
    with pytest.raises(UserError) as caught:
        replay.replay(copy, Place(3, 0, 0))
    told = str(caught.value)
    assert told.startswith("--iteration: 3: no checkpoint of the run is from before it")
    assert "(its first one is of iteration 4): give --checkpoint=0" in told
    assert "or replay an iteration from 4 on" in told


def test_pretraining_has_no_samples(tmp_path):
    """Oracle: the line, by hand."""
    config = configs.make(recipe="pretrain").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="^--workdir: .* holds a run of pretraining"):
        replay.replay(tmp_path, Place(0, 0, 0))
