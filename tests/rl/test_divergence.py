"""KL penalties against golden numbers and the KL of two Gaussians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import schedule, transition
from flowgrpo_jax.rl import divergence

SD3_10 = schedule.shifted_grid(10)


def step(kind, latent, velocity, sigma, sigma_next, noise_level):
    return transition.gaussian(
        kind,
        latent,
        velocity,
        sigma,
        sigma_next,
        sigma_max=SD3_10[1],
        noise_level=noise_level,
    )


@pytest.mark.parametrize(
    "kind, level, form, golden",
    [
        ("sde", 0.7, "official", 4.94268e-6),
        ("sde", 0.7, "paper", 1.977073e-5),
        ("cps", 0.8, "official", 3.752758e-5),
        ("cps", 0.8, "paper", 3.752758e-5),
    ],
)
def test_golden_kl(kind, level, form, golden):
    """Oracle: golden_numbers.md 4."""
    latent = jnp.array([[[0.5, -0.25], [1, 0]]])
    velocity = jnp.array([[[-1, 0.5], [0.25, 2]]])
    moved = velocity + jnp.array([[[0.01, -0.01], [0.02, 0]]])
    reference = step(kind, latent, velocity, 0.75, 0.5, level)
    policy = step(kind, latent, moved, 0.75, 0.5, level)
    kl = divergence.kl_on_means(form, policy.mean, reference.mean, policy)
    # Means near 0.7 round at 6e-8, their differences of 3e-3 by 2e-5 of themselves.
    np.testing.assert_allclose(kl, golden, rtol=5e-5)


@pytest.mark.parametrize(
    "form, golden",
    [
        (
            "official",
            """.000065 .000144 .000465 .001189 .002896 .007235 .019693 .063549
        .297435 .013996""",
        ),
        (
            "paper",
            """.001622 .003073 .008352 .017668 .034857 .068817 .143455 .340150
        1.105213""",
        ),
    ],
)
def test_golden_weights_on_velocities(form, golden):
    """Oracle: golden_numbers.md 6; KL = w_i * (v - v_ref)^2."""
    for i, weight in enumerate(golden.split()):
        sigma, sigma_next = SD3_10[i : i + 2]
        v, v_ref = jnp.float32(1.0), jnp.float32(-1.0)
        policy, reference = (
            step("sde", jnp.float32(0), x, sigma, sigma_next, 0.7) for x in (v, v_ref)
        )
        kl = divergence.kl_on_means(form, policy.mean, reference.mean, policy)
        actual = kl / divergence.kl_on_velocities(v, v_ref)
        # Half a unit of the sixth decimal and a few float32 roundings.
        np.testing.assert_allclose(actual, float(weight), rtol=4e-7, atol=0.5e-6)


def test_paper_form_is_the_kl_of_two_gaussians():
    """Oracle: E[log p - log q] over the action, exact for the quadratic by symmetry."""
    p = step("dance", jnp.float32(0.3), jnp.float32(-0.8), 0.75, 0.5, 0.3)
    q = step("dance", jnp.float32(0.3), jnp.float32(-0.2), 0.75, 0.5, 0.3)
    actions = p.mean + p.std * jnp.array([-1.0, 1.0])
    gap = [
        transition.log_prob("dance", a, p) - transition.log_prob("dance", a, q)
        for a in actions
    ]
    kl = divergence.kl_on_means("paper", p.mean, q.mean, p)
    np.testing.assert_allclose(kl, np.mean(gap), rtol=1e-5)


def test_gradient_goes_to_the_learner_only():
    """Oracle: closed form of the derivative of a square."""
    x, reference = jnp.array([1.0, 3.0]), jnp.array([0.0, 1.0])
    grads = jax.grad(divergence.kl_on_velocities, (0, 1))(x, reference)
    np.testing.assert_array_equal(grads[0], x - reference)
    np.testing.assert_array_equal(grads[1], 0)
    unit = transition.Gaussian(mean=x, std=jnp.float32(1), diffusion=jnp.float32(1))
    for form in divergence.FORMS_ON_MEANS:
        grads = jax.grad(divergence.kl_on_means, (1, 2))(form, x, reference, unit)
        np.testing.assert_array_equal(grads[0], (x - reference) / 2)
        np.testing.assert_array_equal(grads[1], 0)


@pytest.mark.parametrize("form", divergence.FORMS_ON_MEANS)
def test_deterministic_step_is_not_penalised(form):
    """Oracle: definition; 0 with zero gradient, also where std would divide."""
    latent, reference_mean = jnp.ones(3), jnp.zeros(3)

    def kl(velocity):
        policy = step("sde", latent, velocity, 0.75, 0.5, 0.0)
        return divergence.kl_on_means(form, policy.mean, reference_mean, policy)

    value, grad = jax.value_and_grad(kl)(jnp.ones(3))
    assert value == 0 and not grad.any()


def test_norm_excess():
    """Oracle: closed form; (rms - rms_ref)^2 above the reference, 0 below or at it."""
    x = jnp.array([3.0, 4.0])
    np.testing.assert_allclose(divergence.norm_excess(2 * x, x), 12.5, rtol=1e-6)
    grad = jax.grad(divergence.norm_excess)
    for shorter in (x, 0.5 * x, 0 * x):
        assert divergence.norm_excess(shorter, x) == 0
        np.testing.assert_array_equal(grad(shorter, x), 0)
    # 2 (rms - rms_ref) d rms = 2 * rms(x) * x / (2 rms(x)).
    np.testing.assert_allclose(grad(2 * x, x), x, rtol=1e-5)


def test_unknown_form():
    """Oracle: the text of the error a user reads."""
    policy = step("sde", jnp.ones(3), jnp.ones(3), 0.75, 0.5, 0.7)
    with pytest.raises(UserError, match="kl_form: exact: one of official, paper"):
        divergence.kl_on_means("exact", policy.mean, policy.mean, policy)
