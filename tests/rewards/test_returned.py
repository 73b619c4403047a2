"""What rewards of other code bases return, as numbers."""

import collections
import decimal
import fractions
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from flowgrpo_jax.rewards import returned

WANTED = [0.5, -2.0]  # exact in every type of floats but float8_e8m0fnu
FLOATS = [
    *(np.float16, np.float32, np.float64, np.longdouble, ml_dtypes.bfloat16),
    *(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3b11fnuz),
]
TORCH = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def right_scores():
    """(what it is, two scores that are WANTED)."""
    for dtype in FLOATS:
        yield np.dtype(dtype).name, np.array(WANTED, dtype)
        yield f"list of {np.dtype(dtype).name}", list(np.array(WANTED, dtype))
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        yield f"jax {jnp.dtype(dtype)}", jnp.array(WANTED, dtype)
        yield f"list of jax {jnp.dtype(dtype)}", list(jnp.array(WANTED, dtype))
    for dtype in TORCH:
        one = torch.tensor(WANTED, dtype=dtype)
        yield str(dtype), one
        yield f"learning {dtype}", one.clone().requires_grad_()
        yield f"column {dtype}", one[:, None]
        yield f"list of {dtype}", list(one)
        yield f"list of learning {dtype}", list(one.clone().requires_grad_())
    yield "list", WANTED
    yield "tuple", tuple(WANTED)
    yield "list of lists", [[score] for score in WANTED]
    yield "generator", (score for score in WANTED)
    yield "generator of tensors", (torch.tensor(score) for score in WANTED)
    yield "map", map(float, WANTED)
    yield "dict's values", dict(enumerate(WANTED)).values()
    yield "deque", collections.deque(WANTED)
    yield "column", np.array(WANTED)[:, None]
    yield "row", np.array(WANTED)[None]
    yield "matrix", np.matrix(WANTED)
    yield "objects", np.array(WANTED, object)
    yield "fractions", [fractions.Fraction(score) for score in WANTED]
    yield "decimals", [decimal.Decimal(score) for score in WANTED]
    yield "masked nowhere", np.ma.array(WANTED)
    yield "pandas", _Series(WANTED)


class _Series:
    """As a pandas.Series, which is no dependency: numbers behind __array__."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, object if dtype is None else dtype)

    def __iter__(self):
        raise AssertionError("asked for one by one")


@pytest.mark.parametrize(
    "kind, result", [pytest.param(*case, id=case[0]) for case in right_scores()]
)
def test_numbers_of_any_kind(kind, result):
    """Oracle: the numbers, which every one of these types holds exactly."""
    values = returned.shaped(returned.array(result), (2,))
    assert values is not None, kind
    assert values.tolist() == WANTED and values.dtype in (np.float32, np.float64)


def test_whole_numbers_and_truths():
    """Oracle: by hand."""
    for result, wanted in [
        ([True, False], [1, 0]),
        (np.array([250, 3], np.uint8), [250, 3]),
        (torch.tensor([True, False]), [1, 0]),
        (np.array([3, -2], ml_dtypes.int4), [3, -2]),
        ([10**400, -(10**400)], [math.inf, -math.inf]),
        (np.ma.array([7.0, 8.0], mask=[False, True]), [7, math.nan]),
        (np.ma.array([7, 8], mask=[False, True]), [7, math.nan]),
    ]:
        values = returned.shaped(returned.array(result), (2,))
        np.testing.assert_array_equal(values, wanted)


@pytest.mark.parametrize(
    "result",
    [
        *(None, "good", b"good", {1.0, 2.0}, {"a": 1.0, "b": 2.0}, object()),
        *([None, 1.0], ["0.5", "1.5"], np.array(["0.5", "1.5"], object)),
        *([1 + 0j, 2], np.array([1j, 2]), torch.tensor([1j, 2])),
        *([1.0], [1.0, 2.0, 3.0], [[1.0, 2.0], [3.0]], [[1.0, 2.0], [3.0, 4.0]]),
        *(1.0, [], iter([1.0]), (x / 1 for x in range(10**9))),
        np.array(["2020-01-01", "2020-01-02"], "datetime64[D]"),
        np.array([(1.0, 2), (3.0, 4)], [("score", float), ("n", int)]),
        *([np.array([1.0, 2.0]), 3.0], [float, int]),
    ],
    ids=lambda x: str(x).partition(" at 0x")[0][:30],  # the same in every process
)
def test_what_is_not_two_numbers(result):
    """Oracle: by hand; an endless generator is not followed to its end."""
    assert returned.shaped(returned.array(result, most=3), (2,)) is None


def test_an_array_of_its_own():
    """Oracle: what the reward writes on its buffer later does not change scores."""
    buffer = np.zeros(2)
    values = returned.array(buffer)
    buffer += 1
    assert values.tolist() == [0, 0]


def test_scores_with_information():
    """Oracle: the conventions of ddpo-pytorch and flow_grpo, by hand."""
    two = [0.5, 1.5]
    for result, wanted in [
        ((two, {}), two),
        ((two, {"strict": [0, 1]}), two),
        ((two, None), two),
        ((two, two, two), two),
        ((np.array(two), [0, 1]), two),
        ((torch.tensor(two), {}), two),
        ((iter(two), {}), two),
        ((0.5, 1.5), two),
        ((torch.tensor(0.5), torch.tensor(1.5)), two),
        (([0.5], [1.5]), two),
        (torch.tensor([[0.5, 0.1], [0.2, 1.5]]).max(dim=1), two),
        (two, two),
    ]:
        values = returned.shaped(returned.array(returned.scores(result, 2)), (2,))
        assert values is not None and values.tolist() == wanted
    assert returned.scores(({"a": two}, {}), 2) == {"a": two}
    assert returned.scores((0.5, {}), None) == 0.5


def test_one_number():
    """Oracle: by hand."""
    for result in (0.5, [0.5], np.float16(0.5), jax.numpy.full((1, 1), 0.5)):
        assert returned.shaped(returned.array(result), ()) == 0.5
    assert returned.shaped(returned.array([0.5, 0.5]), ()) is None
