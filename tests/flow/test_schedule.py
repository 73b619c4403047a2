"""Schedules against printed tables of the official pipelines and closed forms."""

import numpy as np
import pytest

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import schedule

# Half a unit of the sixth printed decimal, plus a float32 rounding of values below 1.
SIX_DIGITS = 0.5e-6 + 6e-8

SD3_10 = """1 .960129 .913349 .857692 .790368 .707278 .602151 .464876 .278049 .008929
    0"""
SD3_40 = """1 .991331 .982356 .973058 .963421 .953424 .943048 .932270 .921067 .909412
    .897279 .884637 .871453 .857692 .843315 .828280 .812540 .796044 .778738 .760559
    .741440 .721306 .700074 .677652 .653936 .628812 .602151 .573805 .543612 .511384
    .476909 .439941 .400203 .357368 .311062 .260845 .206198 .146509 .081046 .008929
    0"""
FLUX_6 = "1 .903736 .789705 .652489 .484218 .273003 0"
BAGEL_14 = """1 .975 .947368 .916667 .882353 .84375 .8 .75 .692308 .625 .545455 .45
    .333333 .1875 0"""
G2RPO_16 = """1 .9783 .9545 .9286 .9 .8684 .8333 .7941 .75 .7 .6429 .5769 .5 .4091
    .3 .1667 0"""


def numbers(text):
    return np.array(text.split(), np.float64)


@pytest.mark.parametrize(
    "sigmas, golden, tolerance",
    [
        (schedule.shifted_grid(10), SD3_10, SIX_DIGITS),
        (schedule.shifted_grid(40), SD3_40, SIX_DIGITS),
        (schedule.by_tokens(6, image_tokens=1024), FLUX_6, SIX_DIGITS),
        (schedule.shifted(14, 3.0), BAGEL_14, SIX_DIGITS),
        (schedule.shifted(16, 3.0), G2RPO_16, 0.5e-4 + 6e-8),
    ],
    ids=["sd3-10", "sd3-40", "flux-6", "bagel-14", "g2rpo-16"],
)
def test_golden(sigmas, golden, tolerance):
    """Oracle: sigmas printed from the official schedulers (golden numbers)."""
    np.testing.assert_allclose(sigmas, numbers(golden), rtol=0, atol=tolerance)


def test_sd3_timesteps():
    """Oracle: golden timesteps of SD3.5-M, four decimals, fed to the model."""
    golden = """1000 960.1293 913.3490 857.6923 790.3683 707.2785 602.1506 464.8760
        278.0488 8.9286"""
    # A float32 near 1000 is spaced by 6e-5, as is a float32 sigma times 1000.
    timesteps = 1000 * schedule.shifted_grid(10)[:-1]
    np.testing.assert_allclose(timesteps, numbers(golden), rtol=0, atol=0.5e-4 + 6e-5)


@pytest.mark.parametrize(
    "make, options",
    [
        (schedule.linear, {}),
        (schedule.shifted, {"shift": 3.0}),
        (schedule.shifted_grid, {}),
        (schedule.by_tokens, {"image_tokens": 4096}),
    ],
)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
def test_every_schedule_falls_from_noise_to_data(make, options, num_steps):
    """Oracle: invariance; float32, exact ends, strictly decreasing."""
    sigmas = make(num_steps, **options)
    assert sigmas.dtype == np.float32 and sigmas.shape == (num_steps + 1,)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert np.all(np.diff(sigmas) < 0)


def test_shift_of_one_is_linear_and_shifts_compose():
    """Oracle: closed form; shifting by a then b is shifting by a * b."""
    np.testing.assert_array_equal(schedule.shifted(5, 1.0), schedule.linear(5))
    sigma = np.linspace(0, 1, 11)
    twice = schedule.shift_sigma(schedule.shift_sigma(sigma, 2.0), 1.5)
    np.testing.assert_allclose(twice, schedule.shift_sigma(sigma, 3.0), rtol=1e-14)


def test_flux_shift_at_the_ends_of_its_range():
    """Oracle: closed form; mu is base_shift at 256 tokens, max_shift at 4096."""
    for tokens, mu in ((256, 0.5), (4096, 1.15)):
        expected = schedule.shifted(8, float(np.exp(mu)))
        np.testing.assert_allclose(schedule.by_tokens(8, tokens), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: schedule.linear(0), "num_steps: 0: at least 1"),
        (lambda: schedule.shifted_grid(10, shift=0.0), "shift: 0.0: above 0"),
    ],
)
def test_errors_name_key_and_value(call, message):
    """Oracle: the text of the error a user reads."""
    with pytest.raises(UserError, match=message):
        call()
