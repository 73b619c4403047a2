"""What a user's reward returned, as numbers: of torch, jax, lists, whatever it was."""

import itertools
import numbers
from collections.abc import Iterable, Mapping, Set
from decimal import Decimal
from typing import Any

import jax.numpy as jnp
import numpy as np

_LEFT = (str, bytes, bytearray, Mapping, Set)  # no numbers, or in no order


def scores(result: Any, count: int | None) -> Any:
    """The scores of `(scores, info)`, as ddpo-pytorch and flow_grpo return it.

    `count` numbers are wanted, or None for one without a list around it. A tuple is
    taken for such a pair if it has more than one entry and the first one is a dict, or
    has `count` entries of its own, or the second one is a dict or None.
    """
    if not isinstance(result, tuple) or len(result) < 2:
        return result
    first, second = result[:2]
    if count is None or isinstance(first, Mapping) or second is None:
        return first
    return first if isinstance(second, Mapping) or _length(first) == count else result


def array(values: Any, most: int = 1 << 20) -> np.ndarray:
    """An array of its own; of float32 or float64 where it was of another type of floats.

    What is no number at all comes back as an array of another kind than "fiub". Of an
    iterator `most` entries are taken. Overflow is infinite, and what is masked is NaN.
    """
    values = _on_host(values, most)
    if isinstance(values, np.ma.MaskedArray) and values.dtype.kind in "fiub":
        values = np.ma.filled(values.astype(np.float64), np.nan)
    try:
        made = np.array(values)
    except ValueError:  # of rows of several lengths
        return np.array(None)
    if made.dtype.kind == "O":
        return _of_objects(made)
    if jnp.issubdtype(made.dtype, np.floating) and made.dtype.itemsize < 4:
        return made.astype(np.float32)
    if made.dtype == np.longdouble:
        return made.astype(np.float64)
    if made.dtype.kind == "V" and jnp.issubdtype(made.dtype, np.integer):
        return made.astype(np.int64)
    return made


def shaped(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """The numbers in that shape, whatever axes of 1 they had; None if they are others."""
    wanted = [side for side in shape if side != 1]
    if values.dtype.kind not in "fiub" or values.size != np.prod(shape, dtype=int):
        return None
    if [side for side in values.shape if side != 1] != wanted:
        return None
    return values.reshape(shape)


def _on_host(values: Any, most: int) -> Any:
    """What numpy understands."""
    if hasattr(values, "detach") and hasattr(values, "cpu"):  # torch
        tensor = values.detach().cpu()
        try:
            return tensor.numpy()
        except (TypeError, RuntimeError):  # bfloat16 and others that numpy has not
            return tensor.tolist()
    if isinstance(values, np.ndarray) or isinstance(values, _LEFT):
        return values
    if hasattr(values, "__array__"):  # jax, pandas
        return np.asarray(values)
    if isinstance(values, list | tuple):
        return [_on_host(value, most) for value in values]
    if isinstance(values, Iterable):  # a generator, a dict's values
        return [_on_host(value, most) for value in itertools.islice(values, most)]
    return values


def _of_objects(made: np.ndarray) -> np.ndarray:
    flat = [_number(one) for one in made.ravel()]
    if any(one is None for one in flat):
        return made
    return np.array(flat, np.float64).reshape(made.shape)


def _number(value: Any) -> float | None:
    if isinstance(value, np.ndarray) or hasattr(value, "__array__"):
        value = array(value)
        value = value.item() if value.size == 1 and value.dtype.kind in "fiub" else None
    if not isinstance(value, numbers.Real | Decimal):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return float("-inf") if str(value).startswith("-") else float("inf")


def _length(values: Any) -> int | None:
    try:
        return None if isinstance(values, str | bytes) else len(values)
    except TypeError:
        return None
