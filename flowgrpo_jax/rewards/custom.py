"""Anyone's own reward: a function or class, by dotted path or by the name it took.

    reward: {"mypkg.mymodule.redness": 1.0}

`reward` tells how the function wants its images and who shares a call; a function
without it gets a whole batch as numpy. docs/rewards.md has examples.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from PIL import Image

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards import registry
from flowgrpo_jax.rewards.detection import Images
from flowgrpo_jax.runtime.images import to_uint8

BY = ("batch", "image", "group")
KINDS = ("numpy", "jax", "pil")
Function = TypeVar("Function", bound=Callable)


class _Wishes(NamedTuple):
    by: str = "batch"
    images: str = "numpy"


def reward(
    name: str | None = None, *, by: str = "batch", images: str = "numpy"
) -> Callable[[Function], Function]:
    """Decorator of a function or class that scores images.

    Args:
      name: what configs call it, once its module is imported; without one it has its
        dotted path only.
      by: what one call gets, and must return. "batch": images [n, h, w, 3] and their
        prompts, n numbers; "image": one image and its prompt, a number; "group": all
        images [k, h, w, 3] of one prompt and that prompt, k numbers.
      images: "numpy" float32 in [0, 1]; "jax" the same on the device; "pil" a list of
        PIL images (one, by "image").
    """
    for key, value, allowed in (("by", by, BY), ("images", images, KINDS)):
        if value not in allowed:
            raise UserError(f"reward: {key}={value}: must be one of {allowed}")

    def mark(function: Function) -> Function:
        function._reward_wishes = _Wishes(by, images)  # type: ignore[attr-defined]
        if name is not None:
            own = registry.REWARDS.get(name)
            if own is not None and not hasattr(own, "custom"):
                raise UserError(f"reward: {name}: is taken: give it another name")
            factory = functools.partial(_from_context, name, function)
            factory.custom = True  # type: ignore[attr-defined]
            registry.REWARDS[name] = factory
        return function

    return mark


def from_path(path: str, options: Mapping[str, Any]) -> registry.Reward:
    """The reward at "package.module.function"; UserError if there is none."""
    module, _, last = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), last)
    except Exception as error:  # a user's file may do anything
        raise UserError(
            f"reward: {path}: cannot be imported ({type(error).__name__}: {error}): "
            "must be a name of docs/rewards.md or package.module.function"
        ) from error
    if not callable(function):
        raise UserError(f"reward: {path}: must be a function, not {function!r}")
    return make(path, function, options)


def make(name: str, function: Callable, options: Mapping[str, Any]) -> registry.Reward:
    """A reward that calls `function`, or an object of it where it is a class.

    UserError for options that it does not take.
    """
    wishes = getattr(function, "_reward_wishes", _Wishes())
    try:
        scores: Any  # a class is a type of object to the checker
        if inspect.isclass(function):
            scores = function(**options)  # loads what it needs, once
        else:
            inspect.signature(function).bind(None, None, **options)
            scores = functools.partial(function, **options)
    except TypeError as error:
        raise UserError(
            f"reward: {name}: options {dict(options)}: {error}: it is called with "
            "(images, prompts) and these options"
        ) from error
    return _Custom(name, scores, *wishes)


def _from_context(
    name: str, function: Callable, context: registry.Context, **options: Any
) -> registry.Reward:
    return make(name, function, options)


class _Custom:
    """Images as the function wants them, and its scores as a table."""

    def __init__(self, name: str, function: Callable, by: str, images: str):
        self._name, self._function = name, function
        self._by, self._images = by, images
        # Such a function starts programs on the device, which have one order.
        self.on_device = images == "jax"

    def __call__(
        self, images: Images, prompts: Sequence[Prompt]
    ) -> dict[str, np.ndarray]:
        if self._by == "batch":
            result = self._function(self._given(images), list(prompts))
            if isinstance(result, Mapping):  # other measurements beside the score
                return {name: np.asarray(values) for name, values in result.items()}
            return {self._name: self._numbers(result, (len(prompts),))}
        scores = np.empty(len(prompts))
        if self._by == "image":
            for number, prompt in enumerate(prompts):
                [image] = self._given(images[number : number + 1])
                scores[number] = self._numbers(self._function(image, prompt), ())
        else:
            for members in groups(prompts):
                given, prompt = self._given(images[members]), prompts[members[0]]
                result = self._function(given, prompt)
                scores[members] = self._numbers(result, (len(members),))
        return {self._name: scores}

    def _given(self, images: Images) -> Any:
        if self._images == "jax":
            return jnp.asarray(images, jnp.float32)
        if self._images == "pil":
            return [Image.fromarray(pixels) for pixels in to_uint8(np.asarray(images))]
        return np.asarray(images, np.float32)

    def _numbers(self, result: Any, shape: tuple[int, ...]) -> np.ndarray:
        """What the function returned, as numbers of that shape; else UserError."""
        values = np.asarray(result)
        if values.shape != shape or values.dtype.kind not in "fiub":
            wanted = f"{shape[0]} numbers" if shape else "a number"
            shown = " ".join(str(result).split())[:60]
            raise UserError(
                f"reward: {self._name}: returns {shown}, {values.dtype} of shape "
                f"{values.shape}: must be {wanted}"
            )
        return values


def groups(prompts: Sequence[Prompt]) -> list[np.ndarray]:
    """Numbers of the images of each prompt, in the order of the prompts."""
    numbers: dict[tuple[int, str], list[int]] = {}
    for number, prompt in enumerate(prompts):
        numbers.setdefault((prompt.index, prompt.text), []).append(number)
    return [np.array(members) for members in numbers.values()]
