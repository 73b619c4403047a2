"""Losses on transitions, on a linear velocity in latents of two numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import rollout, schedule
from flowgrpo_jax.rl import losses
from flowgrpo_jax.rl.step_weight import tempflow_weights

SHAPE = (2, 1, 1)
STEPS = 10
ON_TRANSITIONS = ["ppo_clip", "guard", "dppo", "policy_gradient"]
SETTINGS = {"clip_range": 1e-4, "adv_clip_max": 5.0, "beta": 0.0, "kl_form": "velocity"}


def velocity(variables, latent, sigma):
    """W x + sigma * b."""
    mixed = jnp.einsum("ij,njwc->niwc", variables["W"], latent)
    return mixed + sigma[:, None, None, None] * variables["b"][:, None, None]


@functools.cache
def make_sampler(kind="sde", noise_level=0.7, velocity=velocity):
    sigmas = tuple(float(s) for s in schedule.shifted(STEPS, 3.0))
    return rollout.Sampler(velocity, sigmas, kind, noise_level)


def variables(shift=0.0):
    w = jnp.array([[0.3, -0.8], [0.5, 0.2]]) + shift
    return {"W": w, "b": jnp.array([0.4, -0.1]) - shift}


@functools.cache
def act(sampler, slots=6, siblings=3, seed=0):
    """Actions of `variables()` with advantages, stored as a rollout does; the noise."""
    keys = jax.random.split(jax.random.key(seed), 3)
    latent = jax.random.normal(keys[0], (slots, *SHAPE))
    noise = jax.random.normal(keys[1], (slots, siblings, *SHAPE))
    step = jnp.arange(slots) % 9
    always = jnp.ones(slots)

    @jax.jit
    def store(variables):
        v = velocity(variables, latent, jnp.asarray(sampler.sigmas)[step])

        def draw(eps):
            return rollout.draw(sampler, latent, v, eps, step, step + 1, always)

        following = jax.vmap(draw, 1, 1)(noise)
        log_prob, _ = rollout.log_probs(
            sampler, latent, following, v, step, step + 1, always
        )
        return rollout.Transitions(latent, following, log_prob, step, step + 1, v)

    advantage = jax.random.normal(keys[2], (slots, siblings))
    return losses.TransitionElements(store(variables()), advantage), noise


def evaluate(loss, elements, shift=0.0, policies=None):
    policies = policies or losses.Policies()
    return jax.jit(loss)(variables(shift), policies, (), elements)


def gradient(loss, elements, shift=0.0):
    def mean(variables):
        return loss(variables, losses.Policies(), (), elements)[0].mean()

    return jax.jit(jax.grad(mean))(variables(shift))


def velocity_gradient(elements, sampler, objective, options=None):
    """d(sum of values) / d(velocity of the slot), from the loss itself."""

    def total(offset):
        moved = make_sampler(
            sampler.kind,
            sampler.noise_level,
            lambda v, x, s: velocity(v, x, s) + offset,
        )
        loss = losses.make(moved, objective, options or {}, **SETTINGS)
        return evaluate(loss, elements)[0].sum()

    return jax.grad(total)(jnp.zeros(elements.transitions.latent.shape))


@pytest.mark.parametrize("kind, level", [("sde", 0.7), ("dance", 0.3), ("cps", 0.8)])
@pytest.mark.parametrize("objective", ON_TRANSITIONS)
def test_on_policy_ratio_is_exactly_one(objective, kind, level):
    """Oracle: an invariance; same weights, same program, same bits."""
    sampler = make_sampler(kind, level)
    elements, _ = act(sampler)
    _, info = evaluate(losses.make(sampler, objective, {}, **SETTINGS), elements)
    np.testing.assert_array_equal(info["ratio"], 1.0)
    np.testing.assert_array_equal(info["ratio_gap"], 0.0)
    np.testing.assert_array_equal(info["approx_kl"], 0.0)
    assert not info["clipfrac"].any()
    _, info = evaluate(losses.make(sampler, objective, {}, **SETTINGS), elements, 0.1)
    assert (info["ratio_gap"] > 0).all() and (info["ratio"] != 1).all()


@pytest.mark.parametrize("objective", ON_TRANSITIONS)
def test_gradient_is_the_gain_times_the_mean_of_advantage_times_noise(objective):
    """Oracle: golden_numbers.md 8; gain_k / n * sum_i A_i eps_i for dL/dv.

    Guard multiplies by std and divides by dt: the gain is 1 + a^2/2, 1 at sigma 1.
    """
    sampler = make_sampler()
    elements, noise = act(sampler)
    sigma, dt = steps_of(sampler, elements)
    a2 = 0.7**2
    remaining = 1 - np.where(sigma == 1, sampler.sigmas[1], sigma)
    diffusion = 0.7 * np.sqrt(sigma / remaining)
    slope = dt * (1 + diffusion**2 * (1 - sigma) / (2 * sigma))
    gain = slope / (diffusion * np.sqrt(dt))
    if objective == "guard":
        gain = np.where(sigma == 1, 1.0, 1 + a2 / 2)
    pull = (elements.advantage[:, :, None, None, None] * noise).sum(axis=1)
    expected = gain[:, None, None, None] * pull / np.prod(SHAPE)
    actual = velocity_gradient(elements, sampler, objective)
    # Actions round at 1e-7, which the division by their std amplifies.
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-5)


def steps_of(sampler, elements):
    sigmas = np.asarray(sampler.sigmas)
    step, stop = elements.transitions.step, elements.transitions.stop
    return sigmas[step], sigmas[step] - sigmas[stop]


def test_guard_without_dt():
    """Oracle: closed form; the same loss times the length of the step."""
    sampler = make_sampler()
    elements, _ = act(sampler)
    _, dt = steps_of(sampler, elements)
    divided, plain = (
        evaluate(
            losses.make(sampler, "guard", {"divide_by_dt": flag}, **SETTINGS),
            elements,
            0.01,
        )[0]
        for flag in (True, False)
    )
    np.testing.assert_allclose(divided * dt[:, None], plain, rtol=1e-6)


@pytest.mark.parametrize("objective", ON_TRANSITIONS)
def test_shared_state_has_the_gradient_of_the_unshared_batch(objective):
    """Oracle: the same actions, each with a copy of its state."""
    sampler = make_sampler()
    elements, _ = act(sampler)
    loss = losses.make(sampler, objective, {}, **SETTINGS | {"clip_range": 0.1})
    stored = elements.transitions
    siblings = elements.advantage.shape[1]

    def alone(x):
        return x.reshape(-1, 1, *x.shape[2:])

    def copied(x):
        return jnp.repeat(x, siblings, axis=0)

    unshared = losses.TransitionElements(
        rollout.Transitions(
            copied(stored.latent),
            alone(stored.next_latent),
            alone(stored.log_prob),
            copied(stored.step),
            copied(stored.stop),
            copied(stored.velocity),
        ),
        alone(elements.advantage),
    )
    for shift in (0.0, 0.02):
        shared, single = (gradient(loss, e, shift) for e in (elements, unshared))
        for name in shared:
            np.testing.assert_allclose(shared[name], single[name], rtol=1e-5, atol=1e-6)


def test_dppo_without_a_threshold_is_the_unclipped_policy():
    """Oracle: PPO with clip ranges that nothing reaches."""
    sampler = make_sampler()
    elements, _ = act(sampler)
    free = losses.make(sampler, "dppo", {"threshold": np.inf}, **SETTINGS)
    wide = {"clip_range": 1.0, "clip_range_high": 1e9}
    ppo = losses.make(sampler, "ppo_clip", {}, **SETTINGS | wide)
    (loss, _), (expected, _) = (evaluate(x, elements, 0.1) for x in (free, ppo))
    np.testing.assert_array_equal(loss, expected)


def test_dppo_at_threshold_zero_only_comes_back():
    """Oracle: golden_numbers.md 13; inward moves have the gradient of -A rho."""
    sampler = make_sampler()
    elements, _ = act(sampler)
    loss = losses.make(sampler, "dppo", {"threshold": 0.0}, **SETTINGS)
    values, info = evaluate(loss, elements, 0.1)
    outward = (info["ratio"] - 1) * elements.advantage > 0
    assert outward.any() and not outward.all()
    np.testing.assert_array_equal(info["clipfrac"], outward)
    expected = jnp.where(outward, 0.0, -elements.advantage * info["ratio"])
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    only_outward = elements.replace(
        advantage=jnp.where(outward, elements.advantage, 0.0)
    )
    for part in gradient(loss, only_outward, 0.1).values():
        np.testing.assert_array_equal(part, 0.0)


def test_upper_range_of_its_own():
    """Oracle: definition; each side is clipped at its own range."""
    sampler = make_sampler()
    elements, _ = act(sampler, siblings=64)
    ranges = {"clip_range": 1e-3, "clip_range_high": 2e-2}
    loss = losses.make(sampler, "ppo_clip", {}, **SETTINGS | ranges)
    _, info = evaluate(loss, elements, 0.1)
    np.testing.assert_array_equal(info["clipfrac_gt_one"], info["ratio"] > 1.02)
    np.testing.assert_array_equal(info["clipfrac_lt_one"], info["ratio"] < 1 - 1e-3)
    assert 0 < info["clipfrac_gt_one"].sum() < info["clipfrac_lt_one"].sum()


def test_tempflow_weights():
    """Oracle: golden_numbers.md 10, for 10 steps, shift 3, a = 0.7."""
    golden = "1.660 1.751 1.261 1.047 .919 .830 .758 .689 .607 .479".split()
    weights = tempflow_weights(make_sampler())
    np.testing.assert_allclose(weights, np.array(golden, float), atol=0.5e-3)
    some = tempflow_weights(make_sampler(), (1, 2, 5))
    np.testing.assert_allclose(some[[1, 2, 5]].mean(), 1.0, rtol=1e-6)


def test_step_weight_multiplies_the_objective():
    """Oracle: the unweighted loss times the weights of its steps."""
    sampler = make_sampler()
    elements, _ = act(sampler)
    plain = losses.make(sampler, "ppo_clip", {}, **SETTINGS)
    weighted = losses.make(sampler, "ppo_clip", {}, **SETTINGS, step_weight="std")
    weights = tempflow_weights(sampler)[elements.transitions.step]
    np.testing.assert_allclose(
        evaluate(weighted, elements)[0],
        weights[:, None] * evaluate(plain, elements)[0],
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "kl_form, kl_reference",
    [
        ("official", "frozen"),
        ("paper", "ema"),
        ("paper", "guided"),
        ("velocity", "frozen"),
        ("velocity", "guided"),
    ],
)
def test_kl_to_each_reference(kl_form, kl_reference):
    """Oracle: closed form in the difference of velocities, dmu = slope * dv."""
    sampler = make_sampler("dance", 0.3)
    elements, _ = act(sampler)

    def guided(variables, latent, sigma):
        return 2.0 * velocity(variables, latent, sigma)

    loss = losses.make(
        sampler,
        "ppo_clip",
        {},
        **SETTINGS | {"beta": 0.5, "kl_form": kl_form},
        kl_reference=kl_reference,
        reference_sampler=make_sampler(velocity=guided),
    )
    policies = losses.Policies(frozen=variables(0.2), ema=variables(0.4))
    values, info = evaluate(loss, elements, 0.0, policies)
    sigma, dt = steps_of(sampler, elements)
    ask = functools.partial(velocity, latent=elements.transitions.latent, sigma=sigma)
    v = np.asarray(ask(variables()))
    other = {
        "frozen": ask(variables(0.2)),
        "ema": ask(variables(0.4)),
        "guided": 2 * ask(variables(0.2)),
    }[kl_reference]
    square = np.mean((v - other) ** 2, axis=(1, 2, 3))
    slope = dt * (1 + 0.3**2 * (1 - sigma) / (2 * sigma))
    variance = {"official": 0.3**2, "paper": 0.3**2 * dt}.get(kl_form)
    if variance is not None:
        square = square * slope**2 / (2 * variance)
    expected = np.broadcast_to(square[:, None], values.shape)
    np.testing.assert_allclose(info["kl_loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(values, info["policy_loss"] + 0.5 * expected, rtol=1e-4)


def test_kl_of_good_samples_counts_more():
    """Oracle: CRD's coefficient (golden_numbers.md 14), c + R (1 - c)."""
    sampler = make_sampler()
    elements, _ = act(sampler)
    advantage = jnp.broadcast_to(jnp.array([-9.0, 0.0, 5.0]), elements.advantage.shape)
    loss = losses.make(
        sampler, "ppo_clip", {}, **SETTINGS | {"beta": 2.0}, kl_floor=0.1
    )
    policies = losses.Policies(frozen=variables(0.2))
    values, info = evaluate(
        loss, elements.replace(advantage=advantage), policies=policies
    )
    factor = 2.0 * np.array([0.1, 0.55, 1.0])
    np.testing.assert_allclose(
        values - info["policy_loss"], factor * info["kl_loss"], rtol=1e-3, atol=1e-6
    )


def test_second_kl_to_the_average():
    """Oracle: closed form; weight * mean (v - v_ema)^2 on top (AWM)."""
    sampler = make_sampler()
    elements, _ = act(sampler)
    loss = losses.make(sampler, "ppo_clip", {}, **SETTINGS, ema_beta=3.0)
    policies = losses.Policies(ema=variables(0.3))
    values, info = evaluate(loss, elements, policies=policies)
    sigma, _ = steps_of(sampler, elements)
    v, average = (
        velocity(x, elements.transitions.latent, sigma)
        for x in (variables(), variables(0.3))
    )
    expected = 3 * jnp.mean((v - average) ** 2, axis=(1, 2, 3))[:, None]
    np.testing.assert_allclose(
        values - info["policy_loss"],
        jnp.broadcast_to(expected, values.shape),
        rtol=1e-4,
    )


def test_hinge_costs_only_longer_velocities():
    """Oracle: definition (NormGuard); 0 where |v| <= |v_ref|, else (|v| - |v_ref|)^2."""
    sampler = make_sampler()
    elements, _ = act(sampler)
    loss = losses.make(sampler, "ppo_clip", {}, **SETTINGS, norm_hinge=2.0)

    def scaled(factor):
        return losses.Policies(frozen=jax.tree.map(lambda x: factor * x, variables()))

    values, info = evaluate(loss, elements, policies=scaled(2.0))
    np.testing.assert_array_equal(info["norm_excess"], 0)
    np.testing.assert_array_equal(values, info["policy_loss"])
    values, info = evaluate(loss, elements, policies=scaled(0.5))
    sigma, _ = steps_of(sampler, elements)
    v = velocity(variables(), elements.transitions.latent, sigma)
    expected = (0.5 * jnp.sqrt(jnp.mean(v**2, axis=(1, 2, 3)))) ** 2
    expected = jnp.broadcast_to(expected[:, None], values.shape)
    np.testing.assert_allclose(info["norm_excess"], expected, rtol=1e-5)
    np.testing.assert_allclose(values, info["policy_loss"] + 2 * expected, rtol=1e-5)


def test_needs():
    """Oracle: which policies each axis compares with."""
    assert losses.needs("ppo_clip") == frozenset()
    assert losses.needs("guard", beta=0.1) == {"old_velocity", "frozen"}
    assert losses.needs("nft", beta=0.1, kl_reference="ema") == {"old", "ema"}
    assert losses.needs("awm", norm_hinge=1.0, ema_beta=1.0) == {"old", "frozen", "ema"}
    assert losses.needs("crd", beta=0.1, kl_reference="guided") == {"old", "frozen"}


@pytest.mark.parametrize(
    "objective, options, settings, message",
    [
        ("reinforce", {}, {}, "train.objective: reinforce: one of ppo_clip, guard"),
        (
            "dppo",
            {"tau": 1.0},
            {},
            "train.objective_options.tau: no option of dppo; its options: threshold$",
        ),
        ("ppo_clip", {"beta": 1.0}, {}, "no option of ppo_clip; its options: none"),
        (
            "awm",
            {"weighting": "cubic"},
            {},
            "train.objective_options.weighting: cubic: one of uniform, t, t2, huber",
        ),
        (
            "nft",
            {"sigma": "beta"},
            {},
            "train.objective_options.sigma: beta: one of uniform, logit_normal",
        ),
        ("flow_matching", {}, {}, "train.objective_options.shift: flow_matching needs"),
        ("nft", {}, {"step_weight": "std"}, "train.step_weight: std: nft has no steps"),
        (
            "nft",
            {},
            {"beta": 0.1, "kl_form": "paper"},
            "train.kl_form: paper: for nft only velocity",
        ),
        ("ppo_clip", {}, {"kl_form": "exact"}, "train.kl_form: exact: one of official"),
        (
            "ppo_clip",
            {},
            {"beta": 0.1, "kl_reference": "guided"},
            "train.kl_reference: guided: needs",
        ),
    ],
)
def test_wrong_values(objective, options, settings, message):
    """Oracle: the text of the error a user reads."""
    with pytest.raises(UserError, match=message):
        losses.make(make_sampler(), objective, options, **SETTINGS | settings)
