"""Recomputed likelihoods against the golden transition of two policies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax.flow import schedule, transition
from flowgrpo_jax.rl import likelihood
from flowgrpo_jax.rl.objectives.awm import matching_log_prob
from flowgrpo_jax.rl.objectives.guard import guard_log_ratio

# Example E of golden_numbers.md 4: sigma 0.75 -> 0.5, an old and a new velocity.
LATENT = jnp.array([[[0.5, -0.25], [1, 0]]])
OLD_VELOCITY = jnp.array([[[-1, 0.5], [0.25, 2]]])
NEW_VELOCITY = OLD_VELOCITY + jnp.array([[[0.01, -0.01], [0.02, 0]]])
NOISE = jnp.array([[[-0.4, 0.1], [1.5, -2]]])
# Log-probs of order 1 round at 6e-8 a few times over; golden digits are finer.
FP32 = 4e-7


def policies(kind, level):
    """(old log-prob, old Gaussian), (new log-prob, new Gaussian) of one action."""
    scalars = (0.75, 0.5)
    options = {"sigma_max": 0.96, "noise_level": level}
    old = transition.gaussian(kind, LATENT, OLD_VELOCITY, *scalars, **options)
    action = transition.sample(old, NOISE)
    actions = action[None]
    return [
        (log_probs[0], step)
        for log_probs, step in (
            transition.log_probs(kind, LATENT, actions, velocity, *scalars, **options)
            for velocity in (OLD_VELOCITY, NEW_VELOCITY)
        )
    ]


@pytest.mark.parametrize(
    "kind, level, old_golden, new_golden, ratio",
    [
        ("sde", 0.7, -1.2209225530, -1.2241512572, 0.9967765025),
        ("cps", 0.8, -0.3629340345, -0.3649504416, 0.9979856245),
    ],
)
def test_golden_ratio(kind, level, old_golden, new_golden, ratio):
    """Oracle: golden_numbers.md 4."""
    (old, _), (new, _) = policies(kind, level)
    log_ratio = likelihood.log_ratio(new, old)
    actual = [old, new, jnp.exp(log_ratio)]
    np.testing.assert_allclose(actual, [old_golden, new_golden, ratio], rtol=FP32)


def test_golden_guard_ratio():
    """Oracle: golden GRPO-Guard ratio, golden_numbers.md 4; and its definition."""
    (old, old_step), (new, step) = policies("sde", 0.7)
    action = transition.sample(old_step, NOISE)
    log_ratio = guard_log_ratio(action, step, old_step)
    np.testing.assert_allclose(jnp.exp(log_ratio), 0.9980565784, rtol=FP32)
    bias = jnp.mean((step.mean - old_step.mean) ** 2) / (2 * step.std**2)
    expected = (likelihood.log_ratio(new, old) + bias) * step.std
    np.testing.assert_allclose(log_ratio, expected, rtol=3e-4)


@pytest.mark.parametrize("kind, level", [("sde", 0.7), ("cps", 0.8)])
def test_guard_ratio_has_no_bias(kind, level):
    """Oracle: symmetry; actions of noise and -noise have opposite log-ratios."""
    (_, old_step), (_, step) = policies(kind, level)
    there, back = (
        guard_log_ratio(transition.sample(old_step, noise), step, old_step)
        for noise in (NOISE, -NOISE)
    )
    np.testing.assert_allclose(there, -back, rtol=1e-5)
    assert there != 0


def test_guard_ratio_of_a_deterministic_step():
    """Oracle: definition; 1 with zero gradient, also where std would divide."""

    def log_ratio(mean):
        still = {"std": jnp.float32(0), "diffusion": jnp.float32(0)}
        step, old = (transition.Gaussian(mean=m, **still) for m in (mean, LATENT))
        return guard_log_ratio(LATENT + 1, step, old)

    value, slope = jax.value_and_grad(log_ratio)(LATENT + 0.5)
    assert value == 0 and not slope.any()


@pytest.mark.parametrize(
    "weighting, expected",
    [
        ("uniform", lambda e, t: e),
        ("t", lambda e, t: t * e),
        ("t2", lambda e, t: t**2 * e),
        ("huber", lambda e, t: t * (np.sqrt(e + 1e-10) - 1e-5)),
        ("ghuber", lambda e, t: 4 * t * ((e + 1e-10) ** 0.25 - 1e-10**0.25)),
    ],
)
def test_matching_log_prob(weighting, expected):
    """Oracle: golden_numbers.md 14 in float64; the slope at a perfect match is finite."""
    error, sigma = np.array([0.0, 0.01, 2.0]), np.array([0.9, 0.3, 0.6])
    actual = matching_log_prob(jnp.array(error), jnp.array(sigma), weighting)
    np.testing.assert_allclose(actual, -expected(error, sigma), rtol=1e-5, atol=1e-9)
    perfect, sigma = jnp.zeros(()), jnp.float32(0.5)
    slope = jax.grad(matching_log_prob)(perfect, sigma, weighting)
    assert np.isfinite(slope) and slope < 0


@pytest.mark.parametrize("kind", ["sde", "cps", "dance"])
def test_on_policy_log_ratio_is_exactly_zero(kind):
    """Oracle: invariance; the same velocity gives the same bits again."""
    (first, _), _ = policies(kind, 0.5)
    (second, _), _ = policies(kind, 0.5)
    assert likelihood.log_ratio(first, second) == 0


def test_gradient_goes_to_the_learner_only():
    """Oracle: closed form; d log-ratio = +1 for the learner, 0 for the old policy."""
    log_probs = jnp.float32(0.3), jnp.float32(0.2)
    assert jax.grad(likelihood.log_ratio, (0, 1))(*log_probs) == (1, 0)


def test_deterministic_step_has_log_prob_zero():
    """Oracle: definition; such a transition teaches nothing and breaks nothing."""
    _, (log_prob, step) = policies("sde", 0.0)
    assert log_prob == 0 and step.std == 0


def test_first_step_uses_sigma_max():
    """Oracle: golden_numbers.md 4; sigma = 1, noise 0.5."""
    sigma_max = schedule.shifted_grid(10)[1]
    log_prob, step = transition.log_probs(
        "sde",
        latent=jnp.float32(1),
        next_latents=jnp.array([1.0950323302]),
        velocity=jnp.float32(0.25),
        sigma=1.0,
        sigma_next=sigma_max,
        sigma_max=sigma_max,
        noise_level=0.7,
    )
    actual = [log_prob[0], step.mean, step.std, step.diffusion]
    golden = [-0.6872635893, 0.7450323302, 0.7, 3.5056715330]
    np.testing.assert_allclose(actual, golden, rtol=FP32)
