"""The config: recipes, arguments, unknown keys, what a workdir holds, the checks."""

import json
import runpy
from pathlib import Path

import pytest

from flowgrpo_jax import checks, recipes
from flowgrpo_jax import config as configs
from flowgrpo_jax.errors import UserError


def test_the_last_word_wins():
    """Oracle: the order default < recipe < config file < argument, by hand."""
    assert configs.make().train.beta == 0.04
    fast = configs.make(recipe="flow_grpo_fast")
    assert fast.train.beta == 0.0 and fast.recipe == "flow_grpo_fast"
    assert configs.make(recipe="flow_grpo_fast", train__beta=0.5).train.beta == 0.5
    chosen = configs.make("recipe=flow_grpo_fast,model=a.safetensors", model="b")
    assert chosen.model == "a.safetensors" and chosen.train.clip_range == 1e-5


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_passes_the_checks(name):
    """Oracle: an invariance; a row of the table is a config that can run."""
    checks.check(configs.make(recipe=name))


@pytest.mark.parametrize(
    "argument, line",
    [
        ("foo", "config argument: foo: must look like recipe=flow_grpo"),
        ("recipe=g2", "recipe: g2: must be one of flow_grpo, flow_grpo_fast"),
        ("tran.beta=1", "tran.beta: unknown config key: did you mean train.beta?"),
        ("group_size=4", "group_size: 4: set it with --config.group_size=... instead"),
        ("reward=a", "reward: a: set it with --config.reward.geneval=... instead"),
    ],
)
def test_a_wrong_argument_is_named(argument, line):
    """Oracle: the line, by hand."""
    with pytest.raises(UserError, match="^" + line.replace("?", r"\?")):
        configs.make(argument)


@pytest.mark.parametrize(
    "key, value, remedy",
    [
        ("group_size", 1, "must be at least 2"),
        ("recipe", "g2", "must be one of flow_grpo"),
        ("dtype", "float8", "must be one of float32, bfloat16"),
        ("train.learning_rate", float("nan"), "must be at least 0"),
        ("train.ema_decay", 1.5, "must be at least 0, at most 1"),
        ("seed", 2**32, "must be at least 0, at most 4294967295"),
        ("log.every", 0, "must be at least 1"),
        ("updates_per_iteration", 5, "must divide prompts_per_iteration"),
        ("sample.sde_window_range", ("a",), "must be two step numbers"),
        ("train.parameters", "attn(", "must be a regular expression"),
        ("reward", {"foo": 1.0}, "must be one of geneval"),
    ],
)
def test_the_checks_name_key_value_and_remedy(key, value, remedy):
    """Oracle: the line holds all three, by hand."""
    with pytest.raises(UserError) as caught:
        checks.check(configs.make(**{key.replace(".", "__"): value}))
    line = str(caught.value)
    shown = "foo" if key == "reward" else str(value)
    assert line.startswith(f"{key}: {shown}") and remedy in line


def test_a_config_survives_the_workdir():
    """Oracle: an invariance; to JSON and back gives the same config."""
    config = configs.make(reward={"geneval": 0.5}, mesh={"data": 2})
    held = json.loads(json.dumps(config.to_dict()))
    assert configs.from_json(held).to_dict() == config.to_dict()
    del held["log"]["tensorboard"]  # written before the key existed
    assert configs.from_json(held).log.tensorboard is True
    held["train"]["gone"] = 1
    with pytest.raises(UserError, match=r"^train\.gone: unknown config key"):
        configs.from_json(held)


def test_a_branch_needs_a_shared_start():
    """Oracle: the line, by hand."""
    with pytest.raises(UserError, match="^sample.init_noise: independent: must be sh"):
        checks.check(configs.make(sample__plan="branch"))


@pytest.mark.parametrize("name", sorted(set(recipes.RECIPES) - {"pretrain"}))
def test_the_geneval_config_leaves_the_recipe_alone(name):
    """Oracle: the row itself; a task's file must not change what a recipe is."""
    path = Path(__file__).parents[1] / "configs" / "geneval.py"
    config = runpy.run_path(str(path))["get_config"](f"recipe={name}")
    for key, value in recipes.RECIPES[name].values.items():
        held = configs.get(config, key)
        assert getattr(held, "to_dict", lambda held=held: held)() == value, key
    checks.check(config)
