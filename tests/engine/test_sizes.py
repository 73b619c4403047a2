"""A run whose prompts are of two sizes, on a flow of three numbers a pixel."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from flowgrpo_jax import config as configs
from flowgrpo_jax import train as trainer
from flowgrpo_jax.assemble import rewards, sizes
from flowgrpo_jax.assemble import run as assembled
from flowgrpo_jax.runtime.resolution import Size
from tests import toy
from tests.tiny_run import rows, use

OWN, WIDE = Size(2, 2), Size(2, 4)
STEP = assembled.Run.step


class Pixels(toy.ToyDenoiser):
    """The toy at any size; tokens are pixels."""

    def tokens(self, latents):
        return latents[0] * latents[1]


MODEL = dataclasses.replace(toy.MODEL, denoiser=Pixels(), latent_shape=(*OWN, 3))
VARIABLES = {"transformer": {"mean": np.zeros(3, np.float32)}, "text": {}}


def bright(images, prompts):
    """A reward for images of any size."""
    del prompts
    return {"geneval": -np.square(images - 1.0).mean(axis=(1, 2, 3))}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The toy in place of a model of diffusers, which can draw any size."""
    use(monkeypatch, bright)
    monkeypatch.setattr(assembled, "starting_model", lambda *_: (MODEL, VARIABLES))
    monkeypatch.setattr(assembled, "save_result", lambda *_: None)
    monkeypatch.setattr(rewards, "world_of", lambda config: None)
    monkeypatch.setattr(
        sizes,
        "asked",
        lambda config, prompts, *_: tuple({p.size for p in prompts if p.size}),
    )
    monkeypatch.setattr(
        sizes,
        "models",
        lambda config, model, wanted: {
            size: dataclasses.replace(model, latent_shape=(*size, 3))
            for size in (model.size, *wanted)
        },
    )


def config_of(tmp_path, said, **values):
    """`said`: the resolutions of the prompts, None for those that say none."""
    lines = [
        {"prompt": f"prompt {n}"} | ({"resolution": str(one)} if one else {})
        for n, one in enumerate(said)
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return configs.make(
        prompts=str(path),
        eval__prompts=str(path),
        num_iterations=6,
        prompts_per_iteration=2,
        group_size=3,
        updates_per_iteration=1,
        microbatch=3,
        mesh={"data": 2},
        sample__num_steps=3,
        sample__eval_num_steps=2,
        sample__guidance_scale=1.0,
        eval__guidance_scale=1.0,
        eval__every=0,
        eval__sde=False,
        eval__images_per_task=4,
        eval__final_images_per_task=4,
        checkpoint__every=1,
        log__tensorboard=False,
        train__use_lora=False,
        **values,
    )


def test_a_run_of_two_sizes(tmp_path, monkeypatch, capsys):
    """Oracle: by hand, a count of compilations, and a run that was killed: equal rows."""
    config = config_of(tmp_path, [None, None, WIDE, WIDE, None, WIDE, WIDE, None])
    compiled = []

    def counted(self, state, iteration):
        compiled.append(0)
        return STEP(self, state, iteration)

    def listen(event, duration, **_):
        if compiled and event == "/jax/core/compile/backend_compile_duration":
            compiled[-1] += 1

    quiet, other = tmp_path / "quiet", tmp_path / "other"
    jax.monitoring.register_event_duration_secs_listener(listen)
    with monkeypatch.context() as patch:
        patch.setattr(assembled.Run, "step", counted)
        assert trainer.train(config, quiet)
    assert "sizes: 4 of 2x2, 4 of 2x4 prompts" in capsys.readouterr().out
    learned = [row for row in rows(quiet) if row["kind"] == "train"]
    drawn = [(row["height"], row["width"]) for row in learned]
    assert set(drawn) == {OWN, WIDE} and drawn.count(OWN) in (2, 3, 4)
    assert [row["ratio_gap"] for row in learned] == [0.0] * 6
    assert learned[-1]["trained_prompt_num"] == 8
    assert learned[-1]["reward_avg"] > learned[0]["reward_avg"]
    # Each size was there twice: its state is the initial one, then one that a program
    # has made.
    again = [n for n in range(6) if drawn[:n].count(drawn[n]) >= 2]
    assert compiled[0] > 0 and [compiled[n] for n in again] == [0] * len(again)
    # The contact sheet has both sizes, enlarged 48 times: a small picture in the middle
    # of its first tile, a wide one in the second.
    sheet = np.asarray(Image.open(quiet / "samples" / "iteration_000006.png"))
    assert (sheet[:96, :48] == 255).all() and (sheet[:96, 194:242] != 255).any()

    def killed(self, state, iteration):
        if iteration == 4:
            raise KeyboardInterrupt
        return STEP(self, state, iteration)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(assembled.Run, "step", killed)
        trainer.train(config, other)
    assert trainer.train(config, other)
    assert json.dumps(rows(other)) == json.dumps(rows(quiet))


def images_of(monkeypatch, config, iteration):
    """What the reward sees in one iteration of the initial model, and its metrics."""
    seen = []

    def watched(images, prompts):
        seen.append(images)
        return bright(images, prompts)

    use(monkeypatch, watched)
    run = assembled.Run(config)
    _, metrics = run.step(run.initial_state(), iteration)
    return np.concatenate(seen), metrics


def test_a_sample_has_the_noise_of_a_run_of_its_size_alone(tmp_path, monkeypatch):
    """Oracle: an invariance, to the last bit; prompts say nothing to the toy."""
    mixed = config_of(tmp_path, [None, None, WIDE, WIDE])
    for iteration in (0, 1):
        found, metrics = images_of(monkeypatch, mixed, iteration)
        size = Size(metrics["height"], metrics["width"])
        assert found.shape == (6, *size, 3)
        (tmp_path / str(iteration)).mkdir()
        alone = config_of(tmp_path / str(iteration), [size, size])
        wanted, metrics = images_of(monkeypatch, alone, iteration)
        assert "height" not in metrics
        np.testing.assert_array_equal(found, wanted)


def test_the_plan_is_that_of_the_largest(tmp_path):
    """Oracle: by hand, whatever the config's own size."""
    run = assembled.Run(config_of(tmp_path, [None, WIDE, None, None]))
    assert run.work.model.size == WIDE and run.model.size == OWN
