"""Objectives against golden losses, closed-form gradients and gains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax.flow import schedule, transition
from flowgrpo_jax.rl.likelihood import Actions
from flowgrpo_jax.rl.objectives.clipping import Clip, reward_probability
from flowgrpo_jax.rl.objectives.dpo import DpoOptions, dpo
from flowgrpo_jax.rl.objectives.dppo import DppoOptions, dppo
from flowgrpo_jax.rl.objectives.noised import (
    Noised,
    SampleElements,
    flow_matching_error,
    self_normalized_error,
)
from flowgrpo_jax.rl.objectives.options import NoOptions
from flowgrpo_jax.rl.objectives.policy_gradient import policy_gradient
from flowgrpo_jax.rl.objectives.ppo_clip import ppo_clip

# A float32 rounding or two of a loss of order 1.
FP32 = 2e-7


def score(objective, log_ratio, advantage, clip, options, divergence=0.0):
    """An objective on actions of one state, whose step has moved by a KL."""
    log_prob = jnp.asarray(log_ratio, jnp.float32)[None]
    latent = jnp.zeros((1, 1, 1, 1))
    # KL = (difference of means)^2 / (2 std^2) with std 1.
    moved = latent + jnp.sqrt(jnp.float32(2 * divergence))
    old, new = (
        transition.Gaussian(x, jnp.ones(1), jnp.ones(1)) for x in (latent, moved)
    )
    siblings = jnp.zeros((1, log_prob.shape[1], 1, 1, 1))
    actions = Actions(
        log_prob, jnp.zeros_like(log_prob), siblings, new, old, jnp.ones(1)
    )
    advantage = jnp.asarray(advantage, jnp.float32)[None]
    loss, info = objective(actions, advantage, clip, options)
    return loss[0], {name: value[0] for name, value in info.items()}


def ppo(log_ratio, advantage, low=1e-4, high=1e-4, adv_clip_max=5.0):
    clip = Clip(low, high, adv_clip_max)
    return score(ppo_clip, log_ratio, advantage, clip, NoOptions())


@pytest.mark.parametrize("clip_range", [1e-3, 1e-4, 1e-5])
def test_golden_losses(clip_range):
    """Oracle: golden_numbers.md 4; ratio below its range."""
    log_ratio = np.full(2, np.log(0.9967765025))
    loss, info = ppo(log_ratio, [1.5, -1.5], clip_range, clip_range)
    # -A ratio is the max for A > 0; for A < 0 it is the clipped one.
    golden = [-1.4951647538, 1.5 * (1 - clip_range)]
    np.testing.assert_allclose(loss, golden, rtol=FP32)
    np.testing.assert_allclose(info["ratio"], 0.9967765025, rtol=FP32)
    np.testing.assert_allclose(
        info["approx_kl"], np.log(0.9967765025) ** 2 / 2, rtol=1e-6
    )


def test_flags_and_asymmetric_range():
    """Oracle: closed form; 1 - low and 1 + high bound the ratio separately."""
    ratio = np.array([0.85, 0.95, 1.0, 1.15, 1.25])
    loss, info = ppo(np.log(ratio), np.ones(5), low=0.1, high=0.2)
    np.testing.assert_allclose(loss, [-0.85, -0.95, -1, -1.15, -1.2], rtol=FP32)
    np.testing.assert_array_equal(info["clipfrac_lt_one"], [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(info["clipfrac_gt_one"], [0, 0, 0, 0, 1])
    np.testing.assert_array_equal(info["clipfrac"], [1, 0, 0, 0, 1])


def test_advantage_is_clipped():
    """Oracle: closed form at ratio 1."""
    loss, _ = ppo([0.0, 0.0, 0.0], [7.0, -9.0, 2.0])
    np.testing.assert_array_equal(loss, [-5, 5, -2])


def test_gradient_by_side_of_the_range():
    """Oracle: closed form; -A ratio inside, 0 where the clip binds, -A at ratio 1."""
    log_ratio = jnp.array([0.0, 5e-5, 1e-3, 1e-3, -1e-3, -1e-3])
    advantage = jnp.array([2.0, 2.0, 2.0, -2.0, 2.0, -2.0])
    grad = jax.grad(lambda x: ppo(x, advantage)[0].sum())(log_ratio)
    free = -advantage * jnp.exp(log_ratio)
    expected = jnp.where(jnp.array([1, 1, 0, 1, 1, 0]) == 1, free, 0.0)
    np.testing.assert_allclose(grad, expected, rtol=FP32)


def test_dppo_leaves_out_only_what_goes_further_away():
    """Oracle: the rule of golden_numbers.md 13, case by case, at D on either side."""
    log_ratio = jnp.array([0.1, 0.1, -0.1, -0.1, 0.0])
    advantage = jnp.array([2.0, -2.0, 2.0, -2.0, 2.0])
    free = -advantage * jnp.exp(log_ratio)

    def dppo_at(divergence):
        options = DppoOptions(threshold=0.5)
        return score(dppo, log_ratio, advantage, Clip(1, 1, 5.0), options, divergence)

    loss, info = dppo_at(0.4)
    np.testing.assert_allclose(loss, free, rtol=FP32)
    assert not info["clipfrac"].any()
    loss, info = dppo_at(0.5)
    np.testing.assert_allclose(loss, [0, free[1], free[2], 0, free[4]], rtol=FP32)
    np.testing.assert_array_equal(info["clipfrac_gt_one"], [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(info["clipfrac_lt_one"], [0, 0, 0, 1, 0])


def test_policy_gradient():
    """Oracle: closed form; the slope in the log-prob is -A at any ratio, A clipped."""
    log_ratio, advantage = jnp.array([0.0, 2.0, -1.0]), jnp.array([1.0, -9.0, 3.0])

    def loss(x):
        return score(policy_gradient, x, advantage, Clip(1, 1, 5.0), NoOptions())[0]

    np.testing.assert_array_equal(loss(log_ratio), [0, 10, 3])
    slope = jax.grad(lambda x: loss(x).sum())(log_ratio)
    np.testing.assert_array_equal(slope, [-1, 5, -3])


def test_reward_probability():
    """Oracle: golden_numbers.md 14; clip(A / (2 * 5) + 1/2, 0, 1)."""
    actual = reward_probability(jnp.array([-7.0, -5, -1, 0, 5, 9]), 5.0)
    np.testing.assert_allclose(actual, [0, 0, 0.4, 0.5, 1, 1], rtol=FP32)


def test_self_normalized_error_is_scale_free_in_slope():
    """Oracle: closed form; mean square over mean size, the size a constant."""
    data, noise = jnp.zeros((2, 4)), jnp.zeros((2, 4))
    velocity = jnp.array([[1.0, -1, 3, -3], [10.0, -10, 30, -30]])
    loss = self_normalized_error(velocity, data, noise)
    np.testing.assert_allclose(loss, [2.5, 25], rtol=FP32)
    slope = jax.grad(lambda v: self_normalized_error(v, data, noise).sum())
    np.testing.assert_allclose(slope(velocity), [[0.25, -0.25, 0.75, -0.75]] * 2)


ERROR = jnp.array([[0.5, 2.0], [2.0, 0.5]])
REFERENCE = jnp.array([[0.6, 1.5], [1.0, 0.5]])


def dpo_loss(error=ERROR, **options):
    """The loss [pair] where clean latents and noise are 0: an error is v^2 / 1."""
    shape = error.shape
    zero = jnp.zeros((error.size, 1, 1, 1))
    noised = Noised(zero, jnp.ones(error.size), (), zero, zero, shape)
    elements = SampleElements(
        zero.reshape(*shape, 1, 1, 1),
        jnp.zeros(shape),
        jnp.zeros(shape),
        jax.random.split(jax.random.key(0), shape),
        jax.random.split(jax.random.key(0), shape),
        jnp.zeros(shape, int),
    )
    v, v_old = (jnp.sqrt(x).reshape(zero.shape) for x in (error, REFERENCE))
    fixed, chosen = {"old": v_old}, DpoOptions(beta=4.0, **options)
    loss, _ = dpo(noised, v, fixed, elements, Clip(1, 1, 5.0), chosen)
    return loss[:, 0]


def dpo_slope(**options):
    return jax.grad(lambda error: dpo_loss(error, **options).sum())(ERROR)


def test_dpo():
    """Oracle: closed form of the loss and of its slope, beta / 2 * sigmoid(-z)."""
    z = 2.0 * np.array([-0.1 - 0.5, 1.0 - 0.0])
    loss = dpo_loss()
    np.testing.assert_allclose(loss, np.log1p(np.exp(z)), rtol=1e-6)
    slope = 2.0 / (1 + np.exp(-z))
    np.testing.assert_allclose(dpo_slope(), np.stack([slope, -slope], 1), rtol=1e-6)


def test_rejection_scaling_shortens_the_losers_gradient_only():
    """Oracle: slope of an error is as its root; the loser's is cut to the winner's."""
    plain, scaled = dpo_slope(), dpo_slope(rejection_scaling=True)
    np.testing.assert_allclose(scaled[:, 0], plain[:, 0], rtol=1e-6)
    # The first loser is four times as far off: half the slope. The second is nearer.
    np.testing.assert_allclose(
        scaled[:, 1], plain[:, 1] * jnp.array([0.5, 1]), rtol=1e-6
    )
    loss = dpo_loss(rejection_scaling=True)
    np.testing.assert_allclose(loss, dpo_loss(), rtol=1e-6)


def test_preference_weight_prices_a_winner_that_gets_worse():
    """Oracle: definition; weight * beta * max(0, rise of the winner's error)."""
    extra = dpo_loss(preference_weight=0.25) - dpo_loss()
    np.testing.assert_allclose(extra, [0.0, 1.0], rtol=1e-5)


@pytest.mark.parametrize(
    "kind, level, golden",
    [
        ("sde", 0.7, ".051 .069 .113 .160 .219 .296 .406 .574 .868 1.540"),
        ("dance", 0.3, ".630 .678 .734 .800 .879 .977 1.100 1.263 1.493 1.892"),
        ("cps", 0.8, ".066 .112 .157 .198 .232 .252 .250 .215 .132 0"),
    ],
)
def test_policy_gradient_of_every_step(kind, level, golden):
    """Oracle: golden gains, golden_numbers.md 8; dL/dv = gain * A * eps at ratio 1.

    Runs the whole chain, transition to loss, on one dimension with A = eps = 1.
    """
    sigmas = schedule.shifted(10, 3.0)
    options = {"sigma_max": sigmas[1], "noise_level": level}

    def loss(velocity, sigma, sigma_next):
        def act_again(action):
            return transition.log_probs(
                kind,
                jnp.float32(0.4),
                action[None],
                velocity,
                sigma,
                sigma_next,
                **options,
            )

        _, step = act_again(jnp.float32(0))
        log_prob, _ = act_again(step.mean + step.std)
        old = jax.lax.stop_gradient(log_prob)
        loss, _ = ppo(log_prob - old, jnp.ones(1))
        return loss[0]

    gains = jax.vmap(jax.grad(loss), (None, 0, 0))(0.3, sigmas[:-1], sigmas[1:])
    golden = np.array(golden.split(), np.float64)
    # Half a unit of the third decimal; actions round, which small stds amplify.
    np.testing.assert_allclose(gains, golden, rtol=0, atol=0.5e-3 + 1e-5)


def test_flow_matching():
    """Oracle: closed form; zero at the target, mean over latent dims."""
    data = jnp.arange(12.0).reshape(2, 3, 2)
    noise = jnp.cos(data)
    target = noise - data
    np.testing.assert_array_equal(flow_matching_error(target, data, noise), 0)
    off = target.at[0, 0, 0].add(3.0).at[1].add(2.0)
    loss = flow_matching_error(off, data, noise)
    # Adding to a target of about -10 rounds at 1e-6.
    np.testing.assert_allclose(loss, [1.5, 4.0], rtol=1e-5)


def test_flow_matching_of_bfloat16_is_float32():
    """Oracle: float64 of the same rounded inputs."""
    x, data, noise = jax.random.normal(jax.random.key(0), (3, 2, 64), jnp.bfloat16)
    loss = flow_matching_error(x, data, noise)
    assert loss.dtype == jnp.float32
    x, data, noise = (np.asarray(a, np.float64) for a in (x, data, noise))
    expected = ((x - (noise - data)) ** 2).mean(axis=1)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
