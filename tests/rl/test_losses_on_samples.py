"""Losses on clean samples, on a linear velocity in latents of two numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax.flow import rollout
from flowgrpo_jax.flow.schedule import shift_sigma
from flowgrpo_jax.rl import losses
from flowgrpo_jax.rl.objectives.noised import SampleElements, add_noise
from flowgrpo_jax.rl.objectives.sigma_draws import SigmaInRange, sigma_in_range
from flowgrpo_jax.rl.objectives.table import OBJECTIVES

SHAPE = (2, 1, 1)
ON_SAMPLES = [n for n, row in OBJECTIVES.items() if row.consumes == "samples"]
SETTINGS = {"clip_range": 1.0, "adv_clip_max": 5.0, "beta": 0.0, "kl_form": "velocity"}


def velocity(variables, latent, sigma, *text):
    """W x + sigma * b, plus what the text says."""
    mixed = jnp.einsum("ij,njwc->niwc", variables["W"], latent)
    made = mixed + sigma[:, None, None, None] * variables["b"][:, None, None]
    return made + text[0][:, None, None, None] if text else made


SAMPLER = rollout.Sampler(velocity, (1.0, 0.5, 0.0), "ode", 0.0)


def variables(shift=0.0):
    w = jnp.array([[0.3, -0.8], [0.5, 0.2]]) + shift
    return {"W": w, "b": jnp.array([0.4, -0.1]) - shift}


def make_elements(slots=3, siblings=2, seed=0, advantage=None):
    keys = jax.random.split(jax.random.key(seed), 4)
    shape = (slots, siblings)
    if advantage is None:
        advantage = jax.random.normal(keys[1], shape)
    return SampleElements(
        clean=jax.random.normal(keys[0], (*shape, *SHAPE)),
        advantage=jnp.broadcast_to(jnp.asarray(advantage, jnp.float32), shape),
        reward=jax.random.uniform(keys[2], shape),
        noise_key=jax.random.split(keys[3], shape),
        sample_key=jax.random.split(keys[3], shape),
        draw=jnp.zeros(shape, int),
    )


def make(objective, options=None, **settings):
    if objective == "flow_matching":
        options = {"shift": 3.0} | (options or {})
    return losses.make(SAMPLER, objective, options or {}, **SETTINGS | settings)


def policies(shift):
    fixed = variables(shift)
    return losses.Policies(frozen=fixed, old=fixed, ema=fixed)


def evaluate(loss, elements, shift=0.0, fixed=0.0):
    return jax.jit(loss)(variables(shift), policies(fixed), (), elements)


def gradient(loss, elements, shift=0.0, fixed=0.0):
    def total(variables):
        return loss(variables, policies(fixed), (), elements)[0].sum()

    return jax.jit(jax.grad(total))(variables(shift))


def noised(elements, shared=False, **options):
    """What the loss asks the networks about: (noised points, velocity there)."""
    sigma = functools.partial(
        sigma_in_range,
        options=SigmaInRange(**options),
        sigmas=SAMPLER.sigmas,
        draws=1,
    )
    return add_noise(sigma, shared, (), elements)


def errors(elements, shift, shared=False):
    """(mean square, mean absolute error, sigma) [slot, sibling], in float64."""
    points = noised(elements, shared)
    v = np.asarray(velocity(variables(shift), points.latent, points.sigma), np.float64)
    away = v - (np.asarray(points.noise, np.float64) - np.asarray(points.clean))
    square, size = (away**2).mean((1, 2, 3)), np.abs(away).mean((1, 2, 3))
    return tuple(np.reshape(x, points.shape) for x in (square, size, points.sigma))


def assert_trees_close(actual, expected, **tolerance):
    for name in actual:
        np.testing.assert_allclose(actual[name], expected[name], **tolerance)


@pytest.mark.parametrize("objective", ON_SAMPLES)
def test_values_and_measurements_are_by_element(objective):
    """Oracle: the interface; everything is [slot, sibling], finite, and has a slope."""
    elements = make_elements()
    values, info = evaluate(make(objective), elements, 0.1)
    for array in (values, *info.values()):
        assert array.shape == (3, 2) and jnp.isfinite(array).all()
    slopes = gradient(make(objective), elements, 0.1)
    assert all(x.any() for x in jax.tree.leaves(slopes))


@pytest.mark.parametrize("objective", ON_SAMPLES)
def test_fixed_policies_get_no_gradient(objective):
    """Oracle: definition; with all penalties, only the learner is differentiated."""
    loss = make(objective, beta=1.0, ema_beta=1.0, norm_hinge=1.0)

    def total(fixed):
        chosen = losses.Policies(fixed, fixed, fixed)
        return loss(variables(0.1), chosen, (), make_elements())[0].sum()

    for slope in jax.tree.leaves(jax.jit(jax.grad(total))(variables())):
        np.testing.assert_array_equal(slope, 0)


def test_sigma_stays_in_its_range():
    """Oracle: moments of the uniform and of the logit-normal distribution."""
    elements = make_elements(1000, 1)
    bounds = {"sigma_min": 0.2, "sigma_max": 0.6}
    for name, std in (("uniform", 12**-0.5), ("logit_normal", 0.2083)):
        sigma = np.asarray(noised(elements, sigma=name, **bounds).sigma)
        assert sigma.min() > 0.2 and sigma.max() < 0.6
        # 1000 draws: three standard errors.
        np.testing.assert_allclose(sigma.mean(), 0.4, atol=0.4 * 0.29 * 3 / 1000**0.5)
        np.testing.assert_allclose(sigma.std(), 0.4 * std, rtol=0.07)


def test_noising_interpolates_and_shares_draws():
    """Oracle: definition of the forward process; siblings differ unless shared."""
    elements = make_elements(4, 3)
    for shared in (False, True):
        points = noised(elements, shared)
        level = points.sigma[:, None, None, None]
        expected = (1 - level) * points.clean + level * points.noise
        np.testing.assert_allclose(points.latent, expected, rtol=1e-6)
        np.testing.assert_array_equal(
            points.clean.reshape(4, 3, *SHAPE), elements.clean
        )
        assert len(np.unique(points.sigma)) == (4 if shared else 12)
        assert len(np.unique(points.noise)) == 2 * (4 if shared else 12)


def test_text_is_repeated_for_siblings():
    """Oracle: the same samples one to a slot, each with its own row of text."""
    elements = make_elements(3, 2)
    alone = jax.tree.map(lambda x: x.reshape(6, 1, *x.shape[2:]), elements)
    rows = jnp.array([1.0, -2.0, 3.0])
    loss = make("weighted_matching")
    together, _ = loss(variables(), policies(0), (rows, "empty"), elements)
    single, _ = loss(variables(), policies(0), (jnp.repeat(rows, 2), "empty"), alone)
    np.testing.assert_allclose(together.reshape(-1), single[:, 0], rtol=1e-6)


def test_flow_matching_is_the_pretraining_loss():
    """Oracle: the loss as first released, written out: same keys, same numbers."""
    elements = make_elements(64, 1)
    clean = elements.clean[:, 0]

    def draw(key):
        keys = jax.random.split(key, 4)
        sigma = shift_sigma(jax.nn.sigmoid(jax.random.normal(keys[0])), 3.0)
        flat = jax.random.uniform(keys[1])
        sigma = jnp.where(jax.random.uniform(keys[2]) < 0.1, flat, sigma)
        return sigma, jax.random.normal(keys[3], SHAPE)

    @jax.jit
    def released(variables):
        sigma, noise = jax.vmap(draw)(elements.noise_key[:, 0])
        level = sigma[:, None, None, None]
        noisy = (1 - level) * clean + level * noise
        error = (velocity(variables, noisy, sigma) - (noise - clean)) ** 2
        return jnp.mean(error, axis=(1, 2, 3))[:, None]

    values, info = evaluate(make("flow_matching"), elements)
    np.testing.assert_array_equal(values, released(variables()))
    assert list(info) == ["flow_matching_loss"]


@pytest.mark.parametrize(
    "options, factor",
    [
        ({}, lambda e: np.ones((3, 2))),
        ({"weight": "reward"}, lambda e: e.reward),
        ({"weight": "exp_reward", "tau": 3.0}, lambda e: np.exp(3 * e.reward)),
        ({"weight": "advantage"}, lambda e: np.clip(e.advantage, -5, 5)),
    ],
)
def test_weighted_matching(options, factor):
    """Oracle: closed form; the weight times the flow-matching error in float64."""
    elements = make_elements(advantage=[9.0, -1.0])
    values, info = evaluate(make("weighted_matching", options), elements)
    square, _, _ = errors(elements, 0.0)
    np.testing.assert_allclose(info["flow_matching_loss"], square, rtol=1e-5)
    np.testing.assert_allclose(values, factor(elements) * square, rtol=1e-5)


def test_nft_of_good_samples_is_self_normalised_flow_matching():
    """Oracle: golden_numbers.md 14; r = 1, beta = 1, on predicted clean latents."""
    elements = make_elements(advantage=7.0)
    values, _ = evaluate(make("nft"), elements, 0.1)
    square, size, sigma = errors(elements, 0.1)
    np.testing.assert_allclose(values, 5 * sigma * square / size, rtol=1e-5)


def test_nft_without_preference_does_not_move():
    """Oracle: golden_numbers.md 14; at r = 1/2 both gradients cancel exactly.

    Not compiled: a compiler may round the learner and the old policy differently.
    """
    loss = make("nft", {"beta": 0.1})

    def slopes(advantage):
        elements = make_elements(advantage=advantage)

        def total(variables):
            return loss(variables, policies(0), (), elements)[0].sum()

        return jax.grad(total)(variables())

    for slope in slopes(0.0).values():
        np.testing.assert_array_equal(slope, 0)
    assert slopes(1.0)["b"].any()


def test_nft_pulls_towards_good_and_away_from_bad():
    """Oracle: closed form at theta = old; dL = (2 r - 1) * 5 sigma / size * dError.

    The mirror image has the opposite slope, and beta cancels.
    """
    for beta in (1.0, 0.1):
        advantage = jnp.array([3.0, -2.0])
        elements = make_elements(advantage=advantage)
        _, size, sigma = errors(elements, 0.0)
        weights = np.asarray(advantage) / 5 * 5 * sigma / size
        expected = gradient(weighted_by(weights), elements)
        actual = gradient(make("nft", {"beta": beta}), elements)
        assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)


def weighted_by(weights):
    """Constant weights times the flow-matching error."""
    plain = make("weighted_matching")

    def loss(*arguments):
        values, info = plain(*arguments)
        return weights * values, info

    return loss


@pytest.mark.parametrize(
    "weighting, slope",
    [
        ("uniform", lambda e, t: np.ones_like(e)),
        ("t", lambda e, t: t),
        ("t2", lambda e, t: t**2),
        ("huber", lambda e, t: t / (2 * np.sqrt(e + 1e-10))),
        ("ghuber", lambda e, t: t * (e + 1e-10) ** -0.75),
    ],
)
def test_awm_gradient_is_advantage_weighted_flow_matching(weighting, slope):
    """Oracle: golden_numbers.md 14; A / 5 * w'(error) * gradient of the error."""
    elements = make_elements()
    square, _, sigma = errors(elements, 0.0)
    weights = np.asarray(elements.advantage) / 5 * slope(square, sigma)
    expected = gradient(weighted_by(weights), elements)
    actual = gradient(make("awm", {"weighting": weighting}), elements)
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_awm_ratio():
    """Oracle: an invariance on-policy, and the exponential of errors off it."""
    elements = make_elements()
    loss = make("awm", {"weighting": "uniform"})
    _, info = evaluate(loss, elements)
    np.testing.assert_array_equal(info["ratio"], 1.0)
    np.testing.assert_array_equal(info["ratio_gap"], 0.0)
    values, info = evaluate(loss, elements, 0.1)
    ratio = np.exp(errors(elements, 0.0)[0] - errors(elements, 0.1)[0])
    np.testing.assert_allclose(info["ratio"], ratio, rtol=1e-5)
    unclipped = -elements.advantage / 5 * np.minimum(ratio, 2.0)
    pessimist = np.maximum(-elements.advantage / 5 * ratio, unclipped)
    np.testing.assert_allclose(values, pessimist, rtol=1e-5)


def test_dgpo_in_closed_form():
    """Oracle: golden_numbers.md 14 in float64, sigma and noise shared by the group."""
    elements = make_elements(3, 4)
    a = np.asarray(elements.advantage)
    values, _ = evaluate(make("dgpo", {"beta": 10.0}), elements, 0.1)
    error = errors(elements, 0.1, shared=True)[0]
    reference = errors(elements, 0.0, shared=True)[0]
    total = (a * (error - reference)).sum(1, keepdims=True)
    gate = 1 / (1 + np.exp(-10.0 / 4 * total))
    np.testing.assert_allclose(values, gate * a * error, rtol=1e-4)


def test_dgpo_does_not_follow_ratios_that_left_their_range():
    """Oracle: train_sd3_dgpo.py, should_clip: no gradient where exp(d_old - d) is above
    1 + c and A > 0, or below 1 - c and A < 0; the same gradient everywhere else."""
    elements = make_elements(64, 1)
    free = make("dgpo", {"beta": 1.0}, clip_range_high=1e9)
    held = make("dgpo", {"beta": 1.0}, clip_range=0.01)
    ratio = np.exp(errors(elements, 0.0, True)[0] - errors(elements, 0.1, True)[0])
    a = np.asarray(elements.advantage)
    out = np.where(a > 0, ratio > 1.01, ratio < 0.99)[:, 0]
    assert out.any() and not out.all()

    def slopes(loss):
        def each(variables):
            return loss(variables, policies(0.0), (), elements)[0][:, 0]

        made = jax.jit(jax.jacrev(each))(variables(0.1))
        return np.concatenate([x.reshape(64, -1) for x in made.values()], axis=1)

    np.testing.assert_array_equal(slopes(held)[out], 0.0)
    np.testing.assert_allclose(slopes(held)[~out], slopes(free)[~out], rtol=1e-5)
    assert slopes(free)[out].any(axis=1).all()


def test_dgpo_gradient_is_that_of_the_group_preference():
    """Oracle: -log sigmoid(-beta/G sum A (d - d_ref)) by autodiff, over beta / G."""
    elements = make_elements(3, 4)
    points = noised(elements, shared=True)
    beta, group = 10.0, 4

    def preference(variables_):
        error, reference = (
            points.error(velocity(v, points.latent, points.sigma))
            for v in (variables_, variables())
        )
        total = (elements.advantage * (error - reference)).sum(axis=1)
        return (jax.nn.softplus(beta / group * total) * group / beta).sum()

    free = make("dgpo", {"beta": beta}, clip_range_high=1e9)
    actual = gradient(free, elements, 0.1)
    assert_trees_close(
        actual, jax.grad(preference)(variables(0.1)), rtol=1e-4, atol=1e-5
    )


def test_crd_in_closed_form():
    """Oracle: golden_numbers.md 14 in float64; uniform centring, squared error, 5/beta."""
    elements = make_elements(3, 4)
    values, info = evaluate(make("crd", {"beta": 0.5}), elements, 0.1)
    (new, new_size, _), (old, old_size, _) = (errors(elements, s) for s in (0.1, 0.0))
    implicit = -(new / new_size - old / old_size)
    reward = np.clip(np.asarray(elements.advantage) / 10 + 0.5, 0, 1)

    def centred(x):
        return x - x.mean(axis=1, keepdims=True)

    expected = (0.5 * centred(implicit) - centred(reward)) ** 2 * 5 / 0.5
    np.testing.assert_allclose(info["implicit_reward"], implicit, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-6)


def test_crd_on_policy_gradient():
    """Oracle: closed form at theta = old; dL = 10 * centred reward / size * dError."""
    elements = make_elements(3, 4)
    _, size, _ = errors(elements, 0.0)
    reward = np.asarray(elements.advantage) / 10 + 0.5
    weights = 10 * (reward - reward.mean(axis=1, keepdims=True)) / size
    expected = gradient(weighted_by(weights), elements)
    actual = gradient(make("crd", {"beta": 0.5}), elements)
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_dpo_in_closed_form():
    """Oracle: golden_numbers.md 14 in float64; one draw per pair, log 2 on-policy."""
    elements = make_elements(5, 2)
    loss = make("dpo", {"beta": 20.0})
    np.testing.assert_allclose(evaluate(loss, elements)[0], np.log(2), rtol=1e-6)
    rise = errors(elements, 0.1, shared=True)[0] - errors(elements, 0.0, shared=True)[0]
    expected = np.log1p(np.exp(10.0 * (rise[:, 0] - rise[:, 1])))
    values, _ = evaluate(loss, elements, 0.1)
    np.testing.assert_allclose(values[:, 0], expected, rtol=1e-4)
    np.testing.assert_array_equal(values[:, 0], values[:, 1])


def test_penalty_on_velocities():
    """Oracle: closed form; beta * mean (v - v_frozen)^2 where the sample is noised."""
    elements = make_elements()
    values, info = evaluate(make("nft", beta=0.3), elements, 0.1, fixed=0.0)
    points = noised(elements)
    ask = functools.partial(velocity, latent=points.latent, sigma=points.sigma)
    kl = jnp.mean((ask(variables(0.1)) - ask(variables())) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(info["kl_loss"], kl.reshape(3, 2), rtol=1e-4)
    np.testing.assert_allclose(
        values, info["policy_loss"] + 0.3 * info["kl_loss"], rtol=1e-6
    )


def test_rows_say_who_are_siblings():
    """Oracle: the papers; pairs for DPO, groups for DGPO and CRD, one otherwise."""
    grouping = {name: OBJECTIVES[name].grouping for name in ON_SAMPLES}
    others = dict.fromkeys(ON_SAMPLES, "one")
    assert grouping == others | {"dgpo": "group", "crd": "group", "dpo": "pair"}
