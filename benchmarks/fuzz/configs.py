"""Configs: every key and group, whoever sets it (a flag, a config file, a workdir).

Oracle: what the checks accept holds numbers of the default's kind, all finite, within
the bounds below; it survives config.json; and what is made of it before a run (plans,
mesh, learning rate, behaviour, sampler, loss) is made, or refused in one line.
"""

import copy
import functools
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags
from hypothesis import strategies as st
from ml_collections import config_flags

from benchmarks.fuzz.core import REFUSED, RIGHT, Surface, Wrong, refused
from flowgrpo_jax import assemble, cli
from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import specs
from flowgrpo_jax.config import checks, recipes, values
from flowgrpo_jax.engine.planner import Planner
from flowgrpo_jax.models.sd3 import transformer_config
from flowgrpo_jax.rl import update as rl_update
from flowgrpo_jax.rl.objectives.options import names
from flowgrpo_jax.rl.objectives.table import OBJECTIVES, PRETRAINING
from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.worlds.sprites import model as sprites_model

CONFIG = Path(__file__).parents[2] / "configs" / "geneval.py"
# Plans of larger ones take their time, and are no other.
_SMALL = {
    "group_size": 24,
    "sample.num_steps": 20,
    "sample.branch_anchors": 4,
    "sample.fanout": 3,
    "sample.probe_steps": 10,
}
# What docs and comments of the config promise, by hand.
ABOVE_ZERO = (
    *("train.learning_rate", "train.lora_alpha", "train.adv_clip_max"),
    *("train.adam_eps", "train.timestep_fraction", "reward_deadline"),
)
AT_LEAST_ONE = (
    *("prompts_per_iteration", "group_size", "updates_per_iteration", "microbatch"),
    *("sample.num_steps", "sample.eval_num_steps", "train.draws", "train.lora_rank"),
    *("train.ema_every", "train.behaviour_every", "checkpoint.every", "log.every"),
)
SHARES = (
    *("sample.noise_correlation", "sample.finish_ratio", "train.clip_range"),
    *("train.kl_floor", "train.timestep_fraction", "train.ema_decay"),
    "train.caption_dropout",
)

# -- what is drawn ---------------------------------------------------------------------

_numbers = st.one_of(
    st.integers(1, 12),
    st.floats(0.001, 1),
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**32, 10**18, 10**400, -(10**400), 0.0, -0.0]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(0, 2),
)
_texts = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [
            "attn(",
            "(?i)x",
            r"attn\.to_q",
            "a{99999999999}",
            "\ud800",
            "a\0",
            "*",
            "geneval",
        ]
    ),
)
_scalars = st.one_of(_numbers, _texts, st.booleans(), st.none())
_anything = st.recursive(
    _scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(st.one_of(_texts, st.integers(0, 2)), inner, max_size=3),
    ),
    max_leaves=8,
)
_NAMES = {
    "reward": ["geneval", "ocr", "my.module.f", "jpeg_compressibility", "nope", ""],
    "eval.reward": ["geneval", "ocr", "nope"],
    "mesh": ["data", "fsdp", "x"],
    "train.caption_noise": ["single_object", "letter", "x"],
    "train.objective_options": sorted(
        {name for row in OBJECTIVES.values() for name in names(row.options)}
    ),
    "reward_options": ["geneval", "ocr", "nope"],
}
_CHOICES = {
    "sample.plan": values.PLANS,
    "sample.sde_type": ("sde", "cps", "cps_gaussian", "dance"),
    "sample.init_noise": ("independent", "shared", "correlated"),
    "train.objective": ("ppo_clip", "guard", "dppo", "policy_gradient", "nft", "awm"),
    "train.behaviour": ("learner", "ema", "copy", "frozen"),
    "train.kl_reference": ("frozen", "ema", "guided"),
    "train.kl_form": ("official", "paper", "velocity"),
    "train.step_weight": ("none", "std"),
    "train.update_order": ("chunks", "steps"),
    "sample.schedule": ("model", "linear", "shifted", "by_tokens"),
}


def _likely(key: str) -> st.SearchStrategy:
    """Values of the key's own kind, near what is allowed."""
    default = _get(_held("flow_grpo"), key)
    if key in _NAMES:
        inner = st.dictionaries(st.sampled_from(_NAMES[key]), _scalars, max_size=2)
        if key == "reward_options":
            return st.dictionaries(st.sampled_from(_NAMES[key]), inner, max_size=2)
        return inner
    if key in _CHOICES:
        return st.sampled_from(_CHOICES[key])
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, tuple):
        return st.lists(st.one_of(st.integers(0, 9), _scalars), max_size=6).map(tuple)
    return _numbers if isinstance(default, int | float) else _texts


def _change() -> st.SearchStrategy:
    def of(key: str) -> st.SearchStrategy:
        likely = _likely(key)
        value = st.one_of(likely, likely, likely, _anything)
        return st.tuples(st.just(key), value)

    known = st.sampled_from(sorted(values.RULES)).flatmap(of)
    strange = st.sampled_from(
        ["beta", "train", "sample.x", "eval", "", "a.b", "seed.x"]
    )
    return st.one_of(known, known, known, known, st.tuples(strange, _anything))


def surface() -> Surface:
    inputs = st.tuples(
        st.sampled_from(["file"] * 5 + ["json"] * 4 + ["flag"]),
        st.sampled_from(sorted(recipes.RECIPES)),
        st.lists(_change(), min_size=1, max_size=3),
    )
    return Surface("configs", inputs, check, seconds=60.0)


# -- what becomes of it ----------------------------------------------------------------


def check(given: tuple[str, str, list[tuple[str, Any]]]) -> str:
    way, recipe, changes = given
    with refused() as lines:
        config = {"file": _from_file, "json": _from_json, "flag": _from_flags}[way](
            recipe, changes
        )
        if config is None:
            return RIGHT
        checks.check(config)
        checks.remarks(config)
        _judge(config)
        _build(config)
    return REFUSED if lines else RIGHT


@functools.cache
def _held(recipe: str) -> dict[str, Any]:
    return configs.make(recipe=recipe).to_dict()


def _set(held: dict, key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        held = held.setdefault(name, {})
        if not isinstance(held, dict):
            return
    held[last] = value


def _from_file(recipe: str, changes) -> ml_collections.ConfigDict | None:
    """As a user's get_config may make it: nothing guards types or names."""
    held = copy.deepcopy(_held(recipe))
    for key, value in changes:
        _set(held, key, value)
    try:
        return ml_collections.ConfigDict(held, type_safe=False, allow_dotted_keys=True)
    except Exception:  # what the user's own file raises, `load_config` tells
        return None


def _from_json(recipe: str, changes) -> ml_collections.ConfigDict | None:
    held = copy.deepcopy(_held(recipe))
    for key, value in changes:
        _set(held, key, value)
    try:
        text = json.dumps(held)
        held = json.loads(text)
    except (ValueError, TypeError):  # too many digits to write: no such file
        return None
    return configs.from_json(held)


def _from_flags(recipe: str, changes) -> ml_collections.ConfigDict | None:
    argv = ["main", f"--config={CONFIG}:recipe={recipe}"]
    for key, value in changes:
        try:
            argv.append(f"--config.{key}={value}")
        except ValueError:
            return None
    before, sys.argv = sys.argv, argv
    try:
        known = flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, "", known)
        cli.parse(known)
        return known["config"].value
    finally:
        sys.argv = before


def _judge(config: ml_collections.ConfigDict) -> None:
    """Wrong for what was accepted and must not be."""
    held = config.to_dict()
    for key in values.RULES:
        value, default = _get(held, key), _get(_held("flow_grpo"), key)
        if isinstance(default, bool) or isinstance(value, bool):
            fits = isinstance(value, bool) and isinstance(default, bool)
        elif isinstance(default, float):
            fits = isinstance(value, int | float)
        elif isinstance(default, tuple):
            fits = isinstance(value, tuple | list)
        else:
            fits = isinstance(value, type(default))
        if not fits or not _finite(value):
            raise Wrong(f"{key} of another kind: {value!r}")
    for keys, holds in (
        (ABOVE_ZERO, lambda x: x > 0),
        (AT_LEAST_ONE, lambda x: x >= 1),
        (SHARES, lambda x: 0 <= x <= 1),
    ):
        for key in keys:
            if not holds(_get(held, key)):
                raise Wrong(f"{key} out of its bounds: {_get(held, key)}")
    for weights in (held["reward"], held["eval"]["reward"]):
        if not all(type(weight) in (int, float) for weight in weights.values()):
            raise Wrong(f"weights that are no numbers: {weights}")
    text = json.dumps(held)
    again = configs.from_json(json.loads(text)).to_dict()
    if json.loads(json.dumps(again)) != json.loads(text):
        raise Wrong("another config after config.json")


def _get(held: Mapping, key: str) -> Any:
    return functools.reduce(lambda group, name: group[name], key.split("."), held)


def _finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, tuple | list):
        return all(map(_finite, value))
    return True


def _build(config: ml_collections.ConfigDict) -> None:
    """All that is made of a config before anything is compiled."""
    meshes.make_abstract_mesh(specs.mesh_shape(config), 8)
    transformer_config.adapted_layers(config.train.lora_targets)
    rl_update.learning_rate(specs.optimizer_spec(config))
    assemble.make_behaviour(config)
    if any(configs.get(config, key) > most for key, most in _SMALL.items()):
        return
    model = _model()
    sampler = assemble.make_sampler(config, model)
    # In the order of a run: the plan has checked the steps when the loss is made.
    if config.train.objective != PRETRAINING and config.prompts_per_iteration <= 64:
        kinds = Planner(specs.plan_spec(config), 1).kinds
        if not all(made.labels for made in kinds):
            raise Wrong("a plan without images")
        assemble.make_loss(config, model, sampler)


@functools.cache
def _model():
    with jax.ensure_compile_time_eval():
        return sprites_model.make_model(sprites_model.Size())
