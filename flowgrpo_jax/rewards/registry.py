"""Rewards by name, and the weighted sum of several."""

import importlib
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError, not_one_of
from flowgrpo_jax.rewards import guard
from flowgrpo_jax.rewards.detection import Detector, Images

# (images, prompts) -> measurements, each with one number per image. The one with the
# reward's own name is the reward; the others are only reported. An attribute
# `check_prompt` (see `prompt_checks`) refuses, before a run, prompts it cannot score;
# `reader` is the encoder of their texts, where it has one.
Reward = Callable[[Images, Sequence[Prompt]], dict[str, np.ndarray]]
# The largest score: the sum of a few hundred of its squares still fits into float32.
LARGEST = 1e18


@dataclass(frozen=True)
class Context:
    """What the caller provides: a detector, and keyword options per reward.

    It keeps the rewards that were created with it in `made`, so that training,
    evaluation and monitors share their networks.
    """

    detector: Detector | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    made: dict[str, Reward] = field(default_factory=dict, compare=False, repr=False)


def _module(name: str) -> Any:
    return importlib.import_module(f"flowgrpo_jax.rewards.{name}")


def _imported(module: str, factory: str) -> Callable[..., Reward]:
    """A factory in another file of this folder, which is imported at its first use."""

    def make_one(context: Context, **options: Any) -> Reward:
        return getattr(_module(module), factory)(context, **options)

    return make_one


# name -> factory: (context, keyword options) -> reward
REWARDS: dict[str, Callable[..., Reward]] = {
    "geneval": _imported("geneval", "make"),
    "jpeg_compressibility": _imported("jpeg", "compressibility"),
    "jpeg_incompressibility": _imported("jpeg", "incompressibility"),
    "ocr": _imported("ocr", "make"),
    "clipscore": _imported("clipscore", "make"),
    "pickscore": _imported("pickscore", "make"),
    "hpsv2": _imported("hpsv2", "make"),
    "aesthetic": _imported("aesthetic", "make"),
    "image_similarity": _imported("image_similarity", "make"),
    "imagereward": _imported("imagereward", "make"),
    "judge": _imported("service.judge", "judge"),
    "qwenvl": _imported("service.judge", "qwen_vl"),
    "unifiedreward": _imported("service.judge", "unified_reward"),
}


def is_known(name: str, options: Iterable[str] = ()) -> bool:
    """Whether this names a reward here, a user's function, or a reward on a server."""
    return name in REWARDS or "." in name or "server" in options


def make(name: str, context: Context | None = None) -> Reward:
    """The reward of that name; the same context gives the same object again.

    Every reward has two options: `server`, the URL of a server that computes it, and
    `replay`, a file that keeps its scores. UserError for an unknown name or option.
    """
    context = context or Context()
    if name not in context.made:
        options = dict(context.options.get(name, {}))
        path = options.pop("replay", None)
        reward = _make(name, context, options)
        if path is not None:
            reward = _module("service.replay").Replay(name, reward, path, options)
        context.made[name] = reward
    return context.made[name]


def reward(name: str, **options: Any) -> Reward:
    """A reward by its name, with its options: a function (images, prompts) -> scores.

    Images are [n, height, width, 3] in [0, 1]; see docs/rewards.md for names, options
    and what each measures. UserError for an unknown name or option.
    """
    return make(name, Context(options={name: options}))


def _make(name: str, context: Context, options: Mapping[str, Any]) -> Reward:
    if "server" in options:
        # First, since an error about another option prints all options.
        _module("service.http").check_url(name, options["server"])
        return built(name, _module("service.client").Remote, name, **options)
    if name not in REWARDS and "." in name:
        return _module("custom").from_path(name, options)
    if name not in REWARDS:
        raise not_one_of("reward", name, REWARDS)
    return built(name, REWARDS[name], context, **options)


def built(name: str, factory: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
    """Calls the factory; UserError for options or files that it cannot take."""
    try:
        return factory(*args, **options)
    except UserError:
        raise
    except TypeError as error:
        raise UserError(f"reward: {name}: options {options}: {error}") from error
    except Exception as error:  # from the libraries that read weights
        raise UserError(
            f"reward: {name}: cannot be loaded: {guard.described(error)}"
        ) from error


@dataclass(frozen=True)
class Combined:
    """Several rewards as one: all their measurements and "avg", their weighted sum.

    A reward of weight 0 is only measured.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float | int]

    def __call__(
        self, images: Images, prompts: Sequence[Prompt]
    ) -> dict[str, np.ndarray]:
        return self.merge(
            {name: reward(images, prompts) for name, reward in self.rewards.items()}
        )

    def merge(
        self, measured: Mapping[str, Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """One table of the measurements that the rewards made of the same images."""
        results: dict[str, np.ndarray] = {}
        for name in self.rewards:
            if clash := set(measured[name]) & {*results, "avg"}:
                raise guard.RewardFailure(
                    f"reward: {name} measures {clash} a second time: give it other names"
                )
            results.update(measured[name])
        avg = np.zeros(len(next(iter(results.values()))))
        for name, weight in self.weights.items():
            if weight:
                scores = np.asarray(results[name])
                # Integers are turned into floats first: they would overflow.
                avg += weight * (scores if scores.dtype.kind == "f" else scores * 1.0)
        if np.any(too_large := np.abs(avg) > LARGEST):
            raise guard.RewardFailure(
                f"reward: avg: {avg[too_large][0]:g}, the weighted sum: must be at most "
                f"{LARGEST:g} in size: take smaller weights"
            )
        return {**results, "avg": avg.astype(np.float32)}


def combine(
    weights: Mapping[str, float | int], context: Context | None = None
) -> Combined:
    """All measurements of the weighted rewards and "avg", their weighted sum.

    UserError for no reward, an unknown one, or a weight that is no number.
    """
    if not weights:
        raise UserError(f"reward: {{}}: give a weight to one of {', '.join(REWARDS)}")
    check_weights("reward", weights)
    context = context or Context()
    return Combined({name: make(name, context) for name in weights}, dict(weights))


def check_weights(key: str, weights: Mapping[str, Any]) -> None:
    """UserError for a weight that is no finite number; `key` is the config's."""
    for name, weight in weights.items():
        number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
        if not number or not -LARGEST <= weight <= LARGEST:
            shown = guard.one_line(repr(weight))[:60]
            raise UserError(
                f"{key}: {name}: weight {shown}: must be finite, a number such as 1.0"
            )
