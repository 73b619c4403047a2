"""Numbers from what a user's reward returned: tensors, arrays, lists or scalars."""

import itertools
import numbers
from collections.abc import Iterable, Mapping, Set
from decimal import Decimal
from typing import Any

import jax.numpy as jnp
import numpy as np

_LEFT = (str, bytes, bytearray, Mapping, Set)  # not numbers, or without an order


def scores(result: Any, count: int | None) -> Any:
    """The scores in a pair `(scores, info)`, which ddpo-pytorch and flow_grpo return.

    `count` is how many numbers are wanted; None is one number without a list around it.
    A tuple of at least two entries is taken for such a pair if the first entry is a
    dict or has `count` entries itself, or if the second one is a dict or None.
    """
    if not isinstance(result, tuple) or len(result) < 2:
        return result
    first, second = result[:2]
    if count is None or isinstance(first, Mapping) or second is None:
        return first
    return first if isinstance(second, Mapping) or _length(first) == count else result


def array(values: Any, most: int = 1 << 20) -> np.ndarray:
    """A new array of the values; floats of unusual types become float32 or float64.

    Values that are no numbers give an array whose kind is not in "fiub". At most `most`
    entries of an iterator are taken. Overflow becomes infinite, masked entries NaN.
    """
    values = _on_host(values, most)
    if isinstance(values, np.ma.MaskedArray) and values.dtype.kind in "fiub":
        values = np.ma.filled(values.astype(np.float64), np.nan)
    try:
        result = np.array(values)
    except ValueError:  # rows of different lengths
        return np.array(None)
    if result.dtype.kind == "O":
        return _of_objects(result)
    if jnp.issubdtype(result.dtype, np.floating) and result.dtype.itemsize < 4:
        return result.astype(np.float32)
    if result.dtype == np.longdouble:
        return result.astype(np.float64)
    if result.dtype.kind == "V" and jnp.issubdtype(result.dtype, np.integer):
        return result.astype(np.int64)
    return result


def shaped(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """The numbers in that shape, axes of length 1 aside; None if they do not fit."""
    wanted = [side for side in shape if side != 1]
    if values.dtype.kind not in "fiub" or values.size != np.prod(shape, dtype=int):
        return None
    if [side for side in values.shape if side != 1] != wanted:
        return None
    return values.reshape(shape)


def _on_host(values: Any, most: int) -> Any:
    """The values in a form that numpy understands."""
    if hasattr(values, "detach") and hasattr(values, "cpu"):  # torch
        tensor = values.detach().cpu()
        try:
            return tensor.numpy()
        except (TypeError, RuntimeError):  # bfloat16 and other types that numpy lacks
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


def _of_objects(result: np.ndarray) -> np.ndarray:
    flat = [_number(one) for one in result.ravel()]
    if any(one is None for one in flat):
        return result
    return np.array(flat, np.float64).reshape(result.shape)


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
