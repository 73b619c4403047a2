"""The embedded worlds by name.

A world is a model whose weights are in the package, prompts, a renderer of scenes, and
a stream of captioned scenes for pretraining. A new world is a row here and a name in
`row.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from flowgrpo_jax.data import tfds_prompts
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.worlds.sprites import model as sprites_model
from flowgrpo_jax.worlds.sprites import monitors as sprites_monitors
from flowgrpo_jax.worlds.sprites import pretraining as sprites_pretraining
from flowgrpo_jax.worlds.sprites import prompts as sprites_prompts
from flowgrpo_jax.worlds.sprites import world as sprites_world
from flowgrpo_jax.worlds.words import model as words_model
from flowgrpo_jax.worlds.words import pretraining as words_pretraining
from flowgrpo_jax.worlds.words import prompts as words_prompts
from flowgrpo_jax.worlds.words import world as words_world


@runtime_checkable
class Stream(Protocol):
    """Captioned scenes, a pure function of (seed, iteration)."""

    def batch(self, iteration: int, size: int) -> Any:
        """`captions` is a list of texts, `scenes` a pytree that `render` takes."""
        ...


@dataclass(frozen=True)
class World:
    """One embedded world.

    `kinds` names the kinds of wrong captions. `model` is a module with WEIGHTS, Size
    and make_model. `stream` takes the seed, the share of wrong captions of each kind, the
    first iteration that has wrong ones, and the share of empty captions.
    """

    model: ModuleType
    prompts: Callable[[str], list[Prompt]]  # takes "train" or "test"
    render: Callable[[Any], Float[Array, "scene height width channel"]]
    stream: Callable[[int, Mapping[str, float], int, float], Stream]
    kinds: tuple[str, ...]
    # (images, number of each image's prompt) -> this world's own measurements, if any.
    monitors: Callable[..., dict[str, float]] | None = None


WORLDS = {
    "sprites": World(
        sprites_model,
        lambda split: tfds_prompts.load(sprites_prompts.PROMPTS, split),
        sprites_world.render,
        sprites_pretraining.SceneStream,
        tuple(sprites_pretraining.TASK_SHARES),
        sprites_monitors.measure,
    ),
    "words": World(
        words_model,
        words_prompts.load,
        words_world.render,
        words_pretraining.WordStream,
        ("letter",),
    ),
}
