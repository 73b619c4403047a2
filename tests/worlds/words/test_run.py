"""The configs of the world of words, and a run of two iterations."""

import functools
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax import train as trainer
from flowgrpo_jax.assemble import specs
from flowgrpo_jax.config import checks, families
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards import ocr, ocr_engine, registry
from flowgrpo_jax.rewards.text_lines import Line
from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.runtime.metrics import read_metrics
from flowgrpo_jax.worlds import embedded
from flowgrpo_jax.worlds.registry import WORLDS
from flowgrpo_jax.worlds.words import model, prompts

CONFIGS = Path(__file__).parents[3] / "configs"
SIZE = functools.partial(model.Size, width=16, depth=1, heads=1)


def config_of(name, arg=None):
    return runpy.run_path(str(CONFIGS / name))["get_config"](arg)


def small(config, **values):
    """The config at a size for tests."""
    for key, value in {
        "num_iterations": 2,
        "prompts_per_iteration": 2,
        "microbatch": 4,
        "sample.num_steps": 3,
        "sample.eval_num_steps": 2,
        "sample.sde_window_range": (0, 2),
        "eval.every": 0,
        "eval.images_per_task": 4,
        "log.tensorboard": False,
        "mesh": {"data": 1},
        **values,
    }.items():
        configs.assign(config, key, value)
    return config


@pytest.fixture
def reader(monkeypatch):
    """In place of the engine: it reads a letter of every pixel that is dark enough."""

    def read(images):
        dark = (np.asarray(images) < 0.3).sum(axis=(1, 2, 3)) % 3
        return [[Line("BA"[:d], 1.0, np.ones((1, 1)), ("B",))] for d in dark]

    make = lambda context, **options: ocr.OCR(read)  # noqa: E731
    monkeypatch.setitem(registry.REWARDS, "ocr", make)
    monkeypatch.setattr(prompts, "load", _few)


def _few(split):
    return [prompts.Prompt(prompts.caption(word)) for word in prompts.words(split)[:4]]


def test_config_knows_the_worlds():
    """Oracle: one list is the other."""
    assert families.embedded_worlds() == tuple(WORLDS)


def test_the_default_is_the_world_of_words():
    """Oracle: the files' own promise."""
    config = config_of("ocr.py")
    checks.check(config)
    assert config.model == config.prompts == config.eval.prompts == "words"
    assert config.recipe == "flow_grpo_fast_v1" and config.reward.to_dict() == {
        "ocr": 1.0
    }
    checks.check(config_of("pretrain_words.py"))
    paper = config_of("ocr.py", "model=sd3.5-medium")
    assert paper.prompts.endswith("train.txt") and paper.train.use_lora
    with pytest.raises(UserError, match="model: sprites: this task .* take words, sd3"):
        config_of("ocr.py", "model=sprites")


def test_without_the_extra_one_line_says_what_to_install(monkeypatch):
    """Oracle: the line, by hand."""
    monkeypatch.setattr(ocr_engine.importlib.util, "find_spec", lambda name: None)
    context = registry.Context(options={"ocr": {"detect": False}})
    with pytest.raises(UserError) as caught:
        registry.make("ocr", context)
    assert str(caught.value) == (
        "reward: ocr: the package rapidocr is missing: pip install 'flowgrpo_jax[ocr]'"
    )


def test_two_iterations_of_flow_grpo(tmp_path, reader):
    """Oracle: the loop's rows; on policy the first ratio is 1, and weights move."""
    built = model.make_model(SIZE())
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: np.asarray(leaf + 0.1 * rng.standard_normal(leaf.shape), "f4"),
        jax.device_get(jax.jit(built.init)(jax.random.key(0))),
    )
    embedded.save(tmp_path / "w.safetensors", variables, built)
    config = small(
        config_of("ocr.py", f"model={tmp_path / 'w.safetensors'}"),
        **{"group_size": 4, "eval.final_images_per_task": 4, "eval.sde": False},
        **{
            "train.ema": False,
            "train.learning_rate": 1e-2,
            "train.decay_iterations": 0,
        },
    )
    assert trainer.train(config, tmp_path / "run")
    train = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    assert len(train) == 2 and train[0]["ratio_gap"] < 1e-6
    assert 0 <= train[0]["reward_ocr"] <= 1
    moved, held = embedded.load(tmp_path / "run" / "weights.safetensors")
    assert held == SIZE()
    assert any(
        not np.array_equal(a, np.asarray(b, np.float16))
        for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(variables), strict=True)
    )


def test_pretraining_paints_the_words_of_its_captions():
    """Oracle: the painter; latents are its pictures in [-1, 1], pack by pack."""
    config = small(config_of("pretrain_words.py"))
    mesh = meshes.make_mesh(specs.mesh_shape(config))
    built, variables = assemble.new_model(config)
    assert built.name == "words" and built.latent_shape == (12, 24, 3)
    work = assemble.make_work(config, mesh, built, variables)
    captions, scenes = WORLDS["words"].stream(0, {}, 0, 0.0).batch(0, 8)
    assert all(caption.startswith('the word "') for caption in captions)
    numbers = np.array([[0, 3], [7, 5]], np.int32)
    np.testing.assert_allclose(
        work.encode(scenes, numbers),
        2 * np.asarray(WORLDS["words"].render(scenes))[numbers] - 1,
        atol=1e-6,
    )


def test_a_world_has_one_size():
    """Oracle: the lines, by hand; height first."""
    config = config_of("pretrain_words.py")
    config.resolution = "12x24"
    assert assemble.fresh_networks(config).latent_shape == (12, 24, 3)
    for wrong in ("24x12", 512):
        config.resolution = wrong
        with pytest.raises(
            UserError, match=f"^resolution: {wrong}: must be 0 or 12x24"
        ):
            assemble.fresh_networks(config)
