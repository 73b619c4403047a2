"""What a user's reward returns or raises, against what its numbers are.

A draw is a few values (numbers of all sizes, and what is none), how they are wrapped
(lists, arrays of every type of floats, tensors, generators, a dict, a pair with
information) and whether the function raises on its way. The oracle: if there is one real
number for each image, of at most 1e18 in size in the type that it came in, these are the
scores; all else is one line that names the reward.
"""

import collections
import decimal
import fractions
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from hypothesis import strategies as st

from benchmarks.fuzz import core
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.rewards import custom
from flowgrpo_jax.rewards.registry import LARGEST, Combined
from flowgrpo_jax.rewards.scoring import Scorer

_NUMBERS = st.one_of(
    st.floats(-100, 100),
    st.integers(-1000, 1000),
    st.booleans(),
    st.floats(),
    st.sampled_from([1e300, 3e38, -1e18, 1.1e18, 65504.0, 1e-45, -0.0]),
)
_OTHERS = st.one_of(
    st.integers(),
    st.sampled_from([2**63, 2**64, -(2**70), 10**400, -(10**400)]),
    st.fractions(),
    st.decimals(),
    st.none(),
    st.text(max_size=5),
    st.sampled_from(["0.5", b"0.5", {}, {1}, [], [0.5] * 9, object, Ellipsis]),
    st.complex_numbers(),
    st.datetimes(),
)
_ERRORS = (KeyError, SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration)
_ERRORS += (MemoryError, RecursionError, UnicodeError, TimeoutError, OSError)


@np.errstate(all="ignore")  # what is too large for a type becomes infinite
def _as(dtype: Any, values: Any) -> np.ndarray:
    return np.array(values, np.float64).astype(dtype)


def _of_numpy(dtype: Any) -> Callable[[list], Any]:
    return lambda values: _as(dtype, values)


def _of_torch(dtype: torch.dtype, learning: bool) -> Callable[[list], Any]:
    return lambda values: (
        torch.tensor([float(v) for v in values]).to(dtype).requires_grad_(learning)
    )


# Of plain numbers alone: (what makes it, the type that it rounds them to).
_ARRAYS: dict[str, tuple[Callable[[list], Any], Any]] = {
    **{
        np.dtype(dtype).name: (_of_numpy(dtype), dtype)
        for dtype in (
            *(np.float16, np.float32, np.float64, np.longdouble),
            *(ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn),
        )
    },
    "torch.float32": (_of_torch(torch.float32, True), np.float32),
    "torch.bfloat16": (_of_torch(torch.bfloat16, True), ml_dtypes.bfloat16),
    "torch.float16": (_of_torch(torch.float16, False), np.float16),
    "jax": (lambda values: jnp.array(_of_numpy(np.float32)(values)), np.float32),
}
# Of values of any kind.
_LISTS: dict[str, Callable[[list], Any]] = {
    "list": list,
    "generator": lambda values: (value for value in values),
    "deque": collections.deque,
    "values": lambda values: dict(enumerate(values)).values(),
    "objects": lambda values: np.fromiter(values, object, len(values)),
    "column": lambda values: [[value] for value in values],
    "row": lambda values: [values],
}
_WRAPS = ("plain", "pair", "dict", "pair of dict")

_drawn: list[Any] = []  # what the function returns next, or raises


def _function(images: np.ndarray, prompts: Sequence[Prompt]) -> Any:
    images *= 0  # none of it may matter to anyone
    prompts[0].metadata["written"] = True
    made = _drawn.pop()
    if isinstance(made, BaseException):
        raise made
    return made


def surface() -> core.Surface:
    made = st.one_of(
        st.tuples(
            st.sampled_from(sorted(_ARRAYS)), st.lists(_NUMBERS, min_size=1, max_size=5)
        ),
        st.tuples(
            st.sampled_from(sorted(_LISTS)),
            st.lists(st.one_of(_NUMBERS, _NUMBERS, _OTHERS), min_size=1, max_size=5),
        ),
        st.tuples(
            st.just("raise"), st.lists(st.integers(0, len(_ERRORS) - 1), max_size=1)
        ),
    )
    inputs = st.tuples(made, st.sampled_from(_WRAPS), st.sampled_from([0, 0, 0, 1, -1]))
    rewards = {"mine": custom.make("mine", _function, {})}
    scorer = Scorer(Combined(rewards, {"mine": 1.0}), deadline=8.0)
    return core.Surface("reward returns", inputs, lambda given: _check(scorer, given))


def _check(scorer: Scorer, given: Any) -> str:
    (kind, values), wrap, more = given
    images = np.full((max(len(values) + more, 1), 2, 2, 3), 0.5, np.float32)
    prompts = [Prompt(f"prompt {n}", {}, n) for n in range(len(images))]
    wanted = _wanted(kind, values, len(images))
    _drawn[:] = [_wrapped(kind, values, wrap)]
    with core.refused() as lines:
        scores = scorer(images, prompts)
    if not (images == 0.5).all() or any(prompt.metadata for prompt in prompts):
        raise core.Wrong("images or prompts of the run were changed")
    if lines:
        if "mine" not in lines[0]:
            raise core.Wrong(f"a line that names no reward: {lines[0]!r}")
        if wanted is not None:
            raise core.Wrong(f"refused though right: {lines[0]!r}")
        return core.REFUSED
    if wanted is None:
        raise core.Wrong(f"taken for scores: {scores['mine']}")
    if not np.array_equal(np.asarray(scores["mine"], np.float64), wanted):
        raise core.Wrong(f"other scores: {scores['mine']} in place of {wanted}")
    return core.RIGHT


def _wrapped(kind: str, values: list, wrap: str) -> Any:
    if kind == "raise":
        return _ERRORS[values[0]]("a text") if values else BaseException()
    made = _ARRAYS[kind][0](values) if kind in _ARRAYS else _LISTS[kind](values)
    if wrap == "pair":
        return made, {"more": values}
    table = {"mine": made, "more": np.zeros(len(values))}
    return {"plain": made, "dict": table}.get(wrap, (table, None))


def _wanted(kind: str, values: list, count: int) -> np.ndarray | None:
    """The scores, or None where there are none."""
    if kind == "raise" or len(values) != count:
        return None
    if kind in _ARRAYS:
        numbers, dtype = [float(value) for value in values], _ARRAYS[kind][1]
        if kind.startswith("torch"):  # by way of its own default
            numbers = _as(np.float32, numbers)
        rounded = _as(dtype, numbers).astype(np.float64)
    else:
        real = (int, float, fractions.Fraction, decimal.Decimal)
        if not all(isinstance(value, real) for value in values):
            return None
        rounded = np.array([_float(value) for value in values])
    return rounded if (np.abs(rounded) <= LARGEST).all() else None


def _float(value: Any) -> float:
    try:
        return float(value)
    except (OverflowError, ValueError):  # too large; a signalling NaN
        return math.nan
