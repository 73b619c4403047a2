"""Every key of the config is looked at, whoever set it."""

import copy
import math

import ml_collections
import pytest

from flowgrpo_jax import config as configs
from flowgrpo_jax.config import checks, recipes, values
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rl.objectives import options
from flowgrpo_jax.rl.objectives.table import OBJECTIVES


def leaves(held, prefix=""):
    for name, value in held.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in configs.OPEN:
            yield from leaves(value, f"{key}.")
        else:
            yield key


def with_value(key, value):
    """A config as a user's get_config may make it: nothing guards its types."""
    held = configs.make().to_dict()
    *path, last = key.split(".")
    group = held
    for name in path:
        group = group[name]
    group[last] = value
    return ml_collections.ConfigDict(held, type_safe=False, allow_dotted_keys=True)


def test_every_key_has_a_rule_and_its_default_is_right():
    """Oracle: the config itself; a new key needs a row in values.RULES."""
    assert set(values.RULES) == set(leaves(configs.base().to_dict()))
    values.check(configs.base())


@pytest.mark.parametrize("key", values.RULES)
def test_what_is_of_another_kind_is_one_line(key):
    """Oracle: the key's name at the start of the line."""
    default = configs.get(configs.base(), key)
    for value in (None, math.nan, {3}, "\ud800", (None,), [[]], {"a": object()}):
        with pytest.raises(UserError) as caught:
            values.check(with_value(key, value))
        assert str(caught.value).startswith(key), value
    if not isinstance(default, bool):
        with pytest.raises(UserError, match=f"^{key}"):
            values.check(with_value(key, True))


@pytest.mark.parametrize(
    "key, value, line",
    [
        ("reward", {"geneval": "1"}, "reward.geneval: 1: must be a number"),
        ("reward", {"geneval": 1.0, "ocr": None}, "reward.ocr: None: must be a number"),
        ("reward", {"geneval": [1]}, "reward.geneval: [1]: must be a number"),
        ("reward", {"geneval": {"a": 1}}, "reward.geneval: {'a': 1}: must be a number"),
        ("reward", {"geneval": math.inf}, "reward.geneval: inf: must be at most 1e+30"),
        ("reward", {}, "reward: {}: give a weight"),
        ("reward", 3, "reward: 3: must be a group"),
        ("eval.reward", {"geneval": 0}, "eval.reward: {'geneval': 0}: one weight"),
        ("eval.reward", {"geneval": True}, "eval.reward.geneval: True: must be a numb"),
        (
            "reward_options",
            {"geneval": 3},
            "reward_options.geneval: 3: must be a group",
        ),
        ("reward_options", {"genevl": {}}, "reward_options.genevl: no reward of this"),
        ("mesh", {"x": 2}, "mesh: x: must be one of data, fsdp, exact"),
        ("mesh", {"data": 0}, "mesh.data: 0: must be at least 1, or -1 for"),
        ("mesh", {"data": -2}, "mesh.data: -2: must be at least -1"),
        ("mesh", {"data": "x"}, "mesh.data: x: must be a whole number"),
        ("mesh", {"exact": 1}, "mesh.exact: 1: must be true or false"),
        ("mesh", {"fsdp": 1.5}, "mesh.fsdp: 1.5: must be a whole number"),
        ("train.caption_noise", {"a": 2}, "train.caption_noise.a: 2: must be at least"),
        (
            "sample.noise_levels",
            (0.1, "x"),
            "sample.noise_levels[1]: x: must be a numb",
        ),
        (
            "sample.sde_window_range",
            (0, 5, 6),
            "sample.sde_window_range: (0, 5, 6): mu",
        ),
        (
            "sample.sde_window_range",
            (0.0, 5),
            "sample.sde_window_range[0]: 0.0: must b",
        ),
        (
            "sample.branch_steps",
            (1, 1),
            "sample.branch_steps: (1, 1): must be step num",
        ),
        ("sample.merge_steps", (0,), "sample.merge_steps[0]: 0: must be at least 1"),
        ("sample.granularities", (), "sample.granularities: (): must be whole numbers"),
        ("train.behaviour_ramp", (0, 0, 0), "train.behaviour_ramp: (0, 0, 0): must be"),
        (
            "train.behaviour_ramp",
            (0, 0, 0, 1),
            "train.behaviour_ramp[3]: 1: must be at",
        ),
        (
            "train.behaviour_ramp",
            (0, 0, 0.5, 0),
            "train.behaviour_ramp[2]: 0.5: must b",
        ),
        (
            "train.lora_targets",
            ("attn(",),
            "train.lora_targets[0]: attn(: must be a re",
        ),
        (
            "train.lora_targets",
            ("(?i)a",),
            "train.lora_targets[0]: (?i)a: must be a re",
        ),
        ("train.lora_targets", (), "train.lora_targets: (): must be regular"),
        ("train.lora_targets", "attn", "train.lora_targets: attn: must be regular"),
        ("monitors", (3,), "monitors[0]: 3: must be a monitor's name"),
        ("train", 3, "train: 3: is a group: set train.adam_eps"),
        ("trian", {}, "trian: unknown config key: did you mean train?"),
        ("train.lora_alpha", 0, "train.lora_alpha: 0: must be above 0"),
        ("train.lora_alpha", -4.0, "train.lora_alpha: -4.0: must be above 0"),
        ("train.adv_clip_max", 0.0, "train.adv_clip_max: 0.0: must be above 0"),
        ("train.learning_rate", 0.0, "train.learning_rate: 0.0: must be above 0"),
        ("train.timestep_fraction", 0.0, "train.timestep_fraction: 0.0: must be above"),
        ("train.adam_eps", 0.0, "train.adam_eps: 0.0: must be above 0"),
        ("train.ema_decay", 1.0, "train.ema_decay: 1.0: must be at least 0, below 1"),
        ("train.clip_range", 0.0, "train.clip_range: 0: must be above 0: train.object"),
        ("train.clip_range", 1.5, "train.clip_range: 1.5: must be at least 0, at most"),
        ("train.caption_dropout", 1.0, "train.caption_dropout: 1.0: must be at least"),
        ("reward_deadline", 0.0, "reward_deadline: 0.0: must be above 0"),
        ("embedding_cache", "", "embedding_cache: '': must be a folder"),
        (
            "num_iterations",
            10**30,
            "num_iterations: 1000000000000000000000000000000: m",
        ),
    ],
)
def test_a_wrong_value_is_one_line(key, value, line):
    """Oracle: how the line begins, by hand."""
    with pytest.raises(UserError) as caught:
        checks.check(with_value(key, value))
    assert str(caught.value).startswith(line)


def test_a_missing_key_is_named():
    """Oracle: the line, by hand."""
    held = configs.make().to_dict()
    del held["train"]["beta"]
    with pytest.raises(UserError, match=r"^train\.beta: missing: begin with"):
        values.check(ml_collections.ConfigDict(held))
    with pytest.raises(UserError, match=r"^checkpoint: missing"):
        values.check(ml_collections.ConfigDict({}))


def test_a_placeholder_without_a_value_is_one_line():
    """Oracle: the line, by hand."""
    config = configs.make()
    config.train.beta = ml_collections.config_dict.required_placeholder(float)
    with pytest.raises(UserError, match=r"^--config: RequiredValueError: .*value"):
        values.check(config)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_options_of_objectives_are_looked_at(objective):
    """Oracle: every option refuses what is no value of its kind, and a typo."""
    for name in options.names(OBJECTIVES[objective].options):
        for value in (None, "nope", math.nan, (1,), {"a": 1}, -1):
            config = configs.make(
                train__objective=objective, train__objective_options={name: value}
            )
            with pytest.raises(UserError, match=f"^train.objective_options.{name}"):
                values.check(config)
    config = configs.make(train__objective=objective, train__objective_options={"x": 1})
    with pytest.raises(UserError, match=r"^train\.objective_options\.x: no option of"):
        values.check(config)


def test_a_range_of_sigmas_that_is_empty_is_refused():
    """Oracle: the line, by hand."""
    config = configs.make(
        recipe="awm", train__objective_options={"sigma_min": 0.9, "sigma_max": 0.2}
    )
    with pytest.raises(UserError, match="sigma_min: 0.9: must be below sigma_max"):
        checks.check(config)


@pytest.mark.parametrize(
    "held",
    [
        {"seed": [1]},
        {"train": 3},
        {"train": None},
        {"seed": {"a": 1}},
        {"mesh": None},
        {"reward": {"geneval": [1, {"b": 2}]}},
        {"": 1},
        {"nope": {}},
        {"reward": {"": 1, "a..b": 1}},
        {"train.beta": "x"},
        {"train": {"beta": 10**400}},
        {"sample": {"branch_steps": [[0]]}},
        {"sample": {"branch_steps": 0}},
    ],
)
def test_a_config_json_that_is_wrong_is_one_line(held):
    """Oracle: a UserError and nothing else, from reading it or from the checks."""
    with pytest.raises(UserError) as caught:
        checks.check(configs.from_json(held))
    assert str(caught.value)


@pytest.mark.parametrize(
    "given, told",
    [
        (
            {"num_iterations": 10, "train__decay_iterations": 20},
            "train.decay_iteration",
        ),
        (
            {"num_iterations": 10, "train__warmup_iterations": 11},
            "train.warmup_iterati",
        ),
        ({"reward_options": {"ocr": {}}}, "reward_options.ocr: is not used"),
        ({"microbatch": 2000}, "microbatch: 2000: more than the 1152 images"),
        (
            {"recipe": "rwr", "num_iterations": 5, "train__behaviour_every": 11},
            "train.behaviour_every: 11: more than the 10 updates",
        ),
    ],
)
def test_what_is_odd_is_told(given, told):
    """Oracle: how the one line begins, by hand."""
    config = configs.make(**given)
    checks.check(config)
    [line] = checks.remarks(config)
    assert line.startswith(told)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_nothing_is_odd_about_a_recipe(name):
    """Oracle: an invariance."""
    assert not checks.remarks(configs.make(recipe=name))


def test_the_kinds_of_wrong_captions_are_those_of_the_world():
    """Oracle: the lines, by hand."""
    for model, names in (("sprites", "single_object"), ("words", "letter")):
        config = configs.make(
            recipe="pretrain", model=model, train__caption_noise={"colour": 0.5}
        )
        with pytest.raises(UserError, match=f"caption_noise: colour: .* of {names}"):
            checks.check(config)


@pytest.mark.parametrize(
    "key, meant",
    [
        ("beta", "train.beta"),
        ("lr", "train.learning_rate"),
        ("train.lr", "train.learning_rate"),
        ("learning_rate", "train.learning_rate"),
        ("sample.group_size", "group_size"),
        ("train.num_steps", "sample.num_steps"),
        ("guidance_scale", "eval.guidance_scale or sample.guidance_scale"),
        ("batch_size", "microbatch"),
        ("evel.prompts", "eval.prompts"),
    ],
)
def test_an_unknown_key_gets_the_one_that_was_meant(key, meant):
    """Oracle: the suggestion, by hand."""
    with pytest.raises(UserError) as caught:
        configs.get(configs.base(), key)
    assert meant in str(caught.value).partition("did you mean ")[2]


def test_other_names_lead_to_keys():
    """Oracle: the config; and no alias hides a key of that name."""
    base = configs.base()
    for other, keys in configs.ALIASES.items():
        assert all(configs.get(base, key) is not None for key in keys)
        assert not any(
            key.rpartition(".")[2] == other for key in leaves(copy.copy(base.to_dict()))
        )
