"""The config: recipes, arguments, unknown keys, what a workdir holds, the checks."""

import json
import runpy
from pathlib import Path

import pytest

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import specs
from flowgrpo_jax.config import checks, recipes
from flowgrpo_jax.engine.planner import Planner
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
        ("resolution", "768x", "must be 0, pixels of a square such as 512, or HEIGHTx"),
        ("resolution", 0.5, "must be 0, pixels"),
        ("dtype", "float8", "must be one of float32, bfloat16"),
        ("train.learning_rate", float("nan"), "must be above 0"),
        ("train.ema_decay", 1.5, "must be at least 0, below 1"),
        ("seed", 2**32, "must be at least 0, at most 4294967295"),
        ("log.every", 0, "must be at least 1"),
        ("updates_per_iteration", 5, "must divide prompts_per_iteration"),
        ("sample.sde_window_range", ("a",), "must be two step numbers"),
        ("train.parameters", "attn(", "must be a regular expression"),
        ("reward", {"foo": 1.0}, "must be one of geneval"),
        ("reward", {"geneval": 0}, "one weight must not be 0"),
        ("eval.reward", {"foo": 1.0}, "must be one of geneval"),
    ],
)
def test_the_checks_name_key_value_and_remedy(key, value, remedy):
    """Oracle: the line holds all three, by hand."""
    with pytest.raises(UserError) as caught:
        checks.check(configs.make(**{key.replace(".", "__"): value}))
    line = str(caught.value)
    shown = "foo" if value == {"foo": 1.0} else str(value)
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


def test_a_resolution_is_a_number_or_a_text():
    """Oracle: by hand; a number is one wherever it comes from, for config.json."""
    for given, held in (("768x1344", "768x1344"), ("512", 512)):
        config = configs.make(f"resolution={given}")
        assert config.resolution == held
        checks.check(config)
        assert configs.from_json(config.to_dict()).resolution == held
    config.resolution = "64x96"
    config.resolution = 512


def test_a_dotted_path_names_a_reward():
    """Oracle: an invariance; to JSON and back gives the same config."""
    mine = {"my.module.f": 1.0}
    options = {"my.module.f": {"scale": 2.0}}
    config = configs.make(reward=mine, reward_options=options)
    checks.check(config)
    held = configs.from_json(json.loads(json.dumps(config.to_dict())))
    assert held.reward.to_dict() == mine and held.reward_options.to_dict() == options


@pytest.mark.parametrize(
    "recipe, values, line",
    [
        ("flow_grpo", {"sample__plan": "branch"}, "sample.init_noise: independent: mu"),
        ("flow_grpo", {"sample__plan": "ode"}, "sample.plan: ode: train.objective ppo"),
        ("flow_cps", {"train__objective": "guard"}, "sample.sde_type: cps: its log-pr"),
        ("flow_cps", {"train__objective": "dppo"}, "sample.sde_type: cps: its log-pro"),
        ("g2rpo", {"train__objective": "nft"}, "sample.plan: branch: train.objective "),
        ("awm", {"train__update_order": "steps"}, "train.update_order: steps: train.o"),
        ("dense_grpo", {"sample__probe_steps": 0}, "train.backup: difference: differe"),
        ("flow_grpo", {"sample__finish_ratio": 0.4}, "sample.finish_ratio: 0.4: the p"),
        ("flow_grpo", {"sample__noise_levels": (1.0,)}, "sample.noise_levels: .1.0,.:"),
        ("flow_grpo", {"group_size": 1}, "group_size: 1: must be at least 2"),
        ("flow_grpo", {"train__draws": 0}, "train.draws: 0: must be at least 1"),
    ],
)
def test_axes_that_cannot_be_together(recipe, values, line):
    """Oracle: the line, by hand."""
    with pytest.raises(UserError, match=f"^{line}"):
        checks.check(configs.make(recipe=recipe, **values))


@pytest.mark.parametrize(
    "values",
    [
        {"sample__noise_level": 0.0},
        {"recipe": "flow_cps", "train__timestep_fraction": 1.0},
        {"recipe": "flow_grpo_fast", "sample__sde_window_range": (7, 10)},
    ],
)
def test_a_step_without_noise_is_not_trained(values):
    """Oracle: the line, by hand; CPS's last step is always deterministic."""
    config = configs.make(**values)
    model, _ = assemble.load_model(config)
    sampler = assemble.make_sampler(config, model)
    with pytest.raises(UserError, match="^sample.noise_level: the .* is trained and"):
        assemble.check_actions(sampler, Planner(specs.plan_spec(config), 1).kinds)


@pytest.mark.parametrize("name", sorted(set(recipes.RECIPES) - {"pretrain"}))
def test_the_geneval_config_leaves_the_recipe_alone(name):
    """Oracle: the row itself; a task's file must not change what a recipe is."""
    path = Path(__file__).parents[2] / "configs" / "geneval.py"
    config = runpy.run_path(str(path))["get_config"](f"recipe={name}")
    for key, value in recipes.RECIPES[name].values.items():
        held = configs.get(config, key)
        assert getattr(held, "to_dict", lambda held=held: held)() == value, key
    checks.check(config)


def test_a_task_follows_its_model():
    """Oracle: Flow-GRPO's config table (its code, config/grpo.py, SD3.5-M)."""
    folder = Path(__file__).parents[2] / "configs"
    make = runpy.run_path(str(folder / "geneval.py"))["get_config"]
    paper = make("model=sd3.5-medium")
    assert (paper.resolution, paper.max_sequence_length) == (512, 128)
    assert (paper.sample.num_steps, paper.sample.eval_num_steps) == (10, 40)
    assert paper.sample.guidance_scale == paper.eval.guidance_scale == 4.5
    assert (paper.prompts_per_iteration, paper.group_size) == (48, 24)
    assert (paper.train.lora_rank, paper.train.lora_alpha) == (32, 64.0)
    assert paper.train.use_lora and paper.dtype == "bfloat16"
    assert (paper.train.beta, paper.train.learning_rate) == (0.04, 3e-4)
    assert make("model=sd3.5-medium,recipe=flow_grpo_fast").train.beta == 0.0
    assert make().model == "sprites" and not make().train.use_lora
    pickscore = runpy.run_path(str(folder / "pickscore.py"))["get_config"]
    assert pickscore().model == "sd3.5-medium" and pickscore().train.beta == 0.01
    assert pickscore("recipe=flow_grpo_fast").train.beta == 0.0
    assert pickscore("model=a/b").train.beta == 0.01
    with pytest.raises(UserError, match="model: sprites: this task is not of the"):
        pickscore("model=sprites")
