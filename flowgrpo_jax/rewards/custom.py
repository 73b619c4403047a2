"""A user's own reward: a function or a class, by dotted path or by its registered name.

    reward: {"mypkg.mymodule.redness": 1.0}

The decorator `reward` says in which form the function takes images, and which images
one call gets. A function without it gets a whole batch as numpy. docs/rewards.md has
examples.
"""

import copy
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from PIL import Image

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError, not_one_of
from flowgrpo_jax.rewards import guard, registry, returned
from flowgrpo_jax.rewards.detection import Images
from flowgrpo_jax.runtime.images import to_uint8

BY = ("batch", "image", "group")
KINDS = ("numpy", "jax", "pil")
Function = TypeVar("Function", bound=Callable)


class _Wishes(NamedTuple):
    by: str = "batch"
    images: str = "numpy"


def reward(
    name: str | Callable | None = None, *, by: str = "batch", images: str = "numpy"
) -> Callable[[Function], Function]:
    """Decorates a function or class that scores images.

    Args:
      name: its name in configs, once its module is imported; without a name it is known
        by its dotted path only.
      by: what one call gets and must return. "batch": images [n, h, w, 3] and their n
        prompts, for n numbers. "image": one image and its prompt, for one number.
        "group": all images [k, h, w, 3] of one prompt and that prompt, for k numbers.
      images: "numpy" is float32 in [0, 1]; "jax" is the same on the device; "pil" is a
        list of PIL images, or a single one with by="image".
    """
    if callable(name):  # @reward without brackets
        return reward(by=by, images=images)(name)
    for key, value, allowed in (("by", by, BY), ("images", images, KINDS)):
        if value not in allowed:
            raise not_one_of("reward", f"{key}={value}", allowed)

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

    def line(reason: str) -> str:
        return (
            f"reward: {path}: cannot be imported ({reason}): must be a name of "
            "docs/rewards.md or package.module.function"
        )

    function = guard.call(
        line,
        guard.ends_children(lambda: getattr(importlib.import_module(module), last)),
    )
    if not callable(function):
        raise UserError(f"reward: {path}: must be a function, not {function!r}")
    return make(path, function, options)


def make(name: str, function: Callable, options: Mapping[str, Any]) -> registry.Reward:
    """A reward that calls `function` or, where that is a class, an instance of it.

    UserError for options that it does not take, or a class that cannot be instantiated.
    """
    wishes = getattr(function, "_reward_wishes", _Wishes())
    if not inspect.isclass(function):
        _check_options(name, function, options, None, None)
        return _Custom(name, functools.partial(function, **options), *wishes)
    _check_options(name, function, options)
    scores = guard.call(
        lambda reason: f"reward.{name}: cannot be made: {reason}",
        # An instance loads what it needs, such as weights, once.
        guard.ends_children(lambda: function(**options)),
    )
    if not callable(scores):
        raise UserError(f"reward: {name}: must have a __call__ of (images, prompts)")
    return _Custom(name, scores, *wishes)


def _check_options(name: str, function: Callable, options, *args: None) -> None:
    """UserError if the function cannot be called with these options."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C: only a call can show it
        return
    try:
        signature.bind(*args, **options)
    except TypeError as error:
        raise UserError(
            f"reward: {name}: options {dict(options)}: {error}: it is called with "
            "(images, prompts) and these options"
        ) from error


def _from_context(
    name: str, function: Callable, context: registry.Context, **options: Any
) -> registry.Reward:
    return make(name, function, options)


class _Custom:
    """Gives a function its images as it wants them, and makes a table of its scores."""

    def __init__(self, name: str, function: Callable, by: str, images: str):
        self._name, self._function = name, guard.ends_children(function)
        self._by, self._images = by, images
        # Such a function starts programs on the device, whose order must be fixed.
        self.on_device = images == "jax"
        self.by_group = by == "group"

    def __call__(
        self, images: Images, prompts: Sequence[Prompt]
    ) -> dict[str, np.ndarray]:
        """The function's measurements of these images.

        Whatever it raises is a RewardFailure, which names the prompt if the call is for
        one prompt. UserError if it returns anything but the numbers that are wanted.
        Each call gets copies of images and prompts, so the function may change them.
        """
        at: list[Prompt] = []

        def line(reason: str) -> str:
            where = [f"prompt {prompt.index} {prompt.text[:80]!r}: " for prompt in at]
            return f"reward.{self._name}: {''.join(where)}{reason}"

        return guard.call(line, lambda: self._measured(images, prompts, at))

    def _measured(
        self, images: Images, prompts: Sequence[Prompt], at: list[Prompt]
    ) -> dict[str, np.ndarray]:
        count = len(prompts)
        if self._by == "batch":
            own = [copy.deepcopy(prompt) for prompt in prompts]
            result = self._function(self._given(images), own)
            result = returned.scores(result, count)
            if isinstance(result, Mapping):  # the score and other measurements
                return {
                    name: self._numbers(values, (count,), f"{name} ")
                    for name, values in result.items()
                }
            return {self._name: self._numbers(result, (count,))}
        scores = np.empty(count)
        if self._by == "image":
            for number, prompt in enumerate(prompts):
                at[:] = [prompt]
                [image] = self._given(images[number : number + 1])
                result = self._function(image, copy.deepcopy(prompt))
                scores[number] = self._numbers(returned.scores(result, None), ())
        else:
            for members in groups(prompts):
                at[:] = [prompts[members[0]]]
                given = self._given(images[members])
                result = self._function(given, copy.deepcopy(at[0]))
                size = len(members)
                result = returned.scores(result, size)
                scores[members] = self._numbers(result, (size,))
        return {self._name: scores}

    def _given(self, images: Images) -> Any:
        if self._images == "jax":
            return jnp.array(images, jnp.float32)  # a copy, since it may be donated
        if self._images == "pil":
            return [Image.fromarray(pixels) for pixels in to_uint8(np.asarray(images))]
        return np.array(images, np.float32)

    def _numbers(
        self, result: Any, shape: tuple[int, ...], what: str = ""
    ) -> np.ndarray:
        """What the function returned, as numbers of that shape; otherwise UserError."""
        most = shape[0] + 1 if shape else 2
        values = returned.array(result, most)
        fitting = returned.shaped(values, shape)
        if fitting is None:
            wanted = f"{shape[0]} numbers" if shape else "a number"
            shown = guard.one_line(result)[:60]
            raise UserError(
                f"reward: {self._name}: returns {what}{shown}, {values.dtype} of shape "
                f"{values.shape}: must be {wanted}"
            )
        return fitting


def groups(prompts: Sequence[Prompt]) -> list[np.ndarray]:
    """Positions of each prompt's images in the batch, in the order of the prompts."""
    numbers: dict[tuple[int, str], list[int]] = {}
    for number, prompt in enumerate(prompts):
        numbers.setdefault((prompt.index, prompt.text), []).append(number)
    return [np.array(members) for members in numbers.values()]
