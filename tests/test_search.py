"""Searches at inference time, on flows whose answers are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import schedule, transition
from flowgrpo_jax.flow.rollout import Sampler
from flowgrpo_jax.inference.search import (
    interpolant,
    methods,
    noise_optimization,
    rollover,
    selection,
)
from flowgrpo_jax.inference.search import setting as settings
from flowgrpo_jax.models.flow_model import guided

SHAPE = (4, 4, 3)
MEAN, STD = 0.5, 0.4  # of the toy data, independent pixels
KEY = jax.random.key(3)
FP32 = 2e-6


class Toy:
    """The exact flow of Gaussian data, as a velocity that counts.

    `text` moves the mean; `calls` counts how often the network ran, `traces` how often
    it was compiled.
    """

    def __init__(self):
        self.traces, self.ran = 0, []

    def __call__(self, variables, latents, sigma, text=None, empty=None):
        self.traces += 1
        jax.debug.callback(lambda: self.ran.append(1))
        mean = variables["mean"]
        if text is not None:
            # Depends on the state: candidates differ in what the prompt changes.
            mean = mean + text[:, :, None, None] * latents[:, :1, :1, :]
        return gaussian_velocity(latents, sigma[:, None, None, None], mean, STD)

    @property
    def calls(self):
        jax.effects_barrier()
        return len(self.ran)


def gaussian_velocity(x, sigma, mean, std):
    """E[eps - x_0 | x] of x = (1 - sigma) x_0 + sigma eps, in closed form."""
    signal = 1 - sigma
    gain = signal * std**2 / (signal**2 * std**2 + sigma**2)
    clean = mean + gain * (x - signal * mean)
    return (x - clean) / sigma


def toy_setting(velocity, num_steps=6, kind="ode", level=0.0, text=(), **changed):
    sigmas = tuple(float(s) for s in schedule.shifted(num_steps, 3.0))
    given = {
        "sampler": Sampler(velocity, sigmas, kind, level),
        "variables": {"mean": jnp.float32(MEAN)},
        "text": text,
        "decode": decode,
        "latent_shape": SHAPE,
        "key": KEY,
        "prompt": 2,
        "microbatch": 1,
    }
    return settings.Setting(**given | changed)


def decode(variables, latents):
    return jnp.clip(latents, 0.0, 1.0)


def first_noise(member, counter=0):
    """The noise contract of the package, written out."""
    key = jax.random.fold_in(jax.random.fold_in(KEY, 2), member)
    return np.asarray(jax.random.normal(jax.random.fold_in(key, counter), SHAPE))


def euler(velocity, sigmas, x):
    for sigma, following in itertools.pairwise(sigmas):
        x = x + (following - sigma) * velocity(x, sigma)
    return x


def mean_reward(images):
    return np.asarray(images).mean(axis=(1, 2, 3))


# --- best of n


@pytest.mark.parametrize("microbatch", [1, 4])
def test_best_of_n_is_the_argmax_of_the_plain_images(microbatch):
    """Oracle: the Euler loop of each member's own noise in float64."""
    toy = Toy()
    setting = toy_setting(toy, microbatch=microbatch)
    plain = np.stack(
        [
            euler(
                lambda x, s: gaussian_velocity(x, s, MEAN, STD),
                setting.sampler.sigmas,
                first_noise(member).astype(np.float64),
            )
            for member in range(6)
        ]
    )
    images = plain.clip(0, 1)
    best = mean_reward(images).argmax()
    assert best != 0
    found = selection.best_of_n(setting, mean_reward, 6)
    np.testing.assert_allclose(found.images[0], images[best], atol=1e-5)
    np.testing.assert_allclose(found.latents[0], plain[best], atol=1e-5)
    np.testing.assert_allclose(found.scores, mean_reward(images[[best]]), atol=1e-5)
    assert found.evaluations == 6 * 6
    assert toy.traces == 1  # one program for all steps and microbatches
    assert toy.calls == -(-6 // microbatch) * 6


def test_stochastic_samplers_draw_the_noise_of_their_steps():
    """Oracle: the transition applied by hand to the noise of counters 1, 2, ..."""
    setting = toy_setting(Toy(), num_steps=3, kind="sde", level=0.7)
    sigmas = setting.sampler.sigmas
    x = first_noise(4)
    for step in range(3):
        gaussian = transition.gaussian(
            "sde",
            jnp.asarray(x),
            jnp.asarray(gaussian_velocity(x, sigmas[step], MEAN, STD)),
            sigmas[step],
            sigmas[step + 1],
            sigma_max=sigmas[1],
            noise_level=0.7,
        )
        fresh = jnp.asarray(first_noise(4, step + 1))
        x = np.asarray(transition.sample(gaussian, fresh))
    found, evaluations = settings.plain(setting, [4])
    np.testing.assert_allclose(found[0], x, atol=1e-5)
    assert evaluations == 3


# --- CFG-Rejection


def guided_toy(scale=2.0, **changed):
    toy = Toy()
    text = (jnp.full((1, 1), 0.3), jnp.zeros((1, 1)))
    return toy, toy_setting(guided(toy, scale), text=text, **changed)


def differences(setting, members, steps, scale):
    """The accumulated noise-level normalised score differences, in float64."""
    totals = []
    for member in members:
        x, total = first_noise(member).astype(np.float64), 0.0
        pairs = list(itertools.pairwise(setting.sampler.sigmas))[:steps]
        for sigma, following in pairs:
            corner = x[:1, :1]
            with_text = gaussian_velocity(x, sigma, MEAN + 0.3 * corner, STD)
            without = gaussian_velocity(x, sigma, MEAN, STD)
            # Score: -noise_hat / sigma. Times sigma: the difference of noise_hat.
            total += np.mean(((1 - sigma) * (with_text - without)) ** 2)
            mixed = without + scale * (with_text - without)
            x = x + (following - sigma) * mixed
        totals.append(total)
    return np.array(totals)


def test_cfg_rejection_keeps_the_largest_differences():
    """Oracle: the scores in float64; the paper: a low difference is a poor sample."""
    toy, setting = guided_toy()
    expected = differences(setting, range(8), 3, 2.0)
    order = np.argsort(-expected)[:3]
    found = selection.cfg_rejection(setting, toy, 2.0, 8, judged_steps=3, share=0.3)
    np.testing.assert_allclose(found.scores, expected[order], rtol=1e-4)
    plain, _ = settings.plain(setting, order.tolist())
    np.testing.assert_allclose(found.latents, plain, atol=1e-5)
    np.testing.assert_allclose(found.images, decode({}, plain), atol=1e-5)


def test_cfg_rejection_spends_what_it_says():
    """Oracle: a counter in the network, one latent at a time."""
    toy, setting = guided_toy()
    found = selection.cfg_rejection(setting, toy, 2.0, 8, judged_steps=3, share=0.3)
    assert found.evaluations == toy.calls == 8 * 3 + 3 * (6 - 3)


@pytest.mark.parametrize(
    "changed, line",
    [
        ({"guidance_scale": 1.0}, "guidance_scale: 1.0: cfg_rejection compares"),
        ({"judged_steps": 6}, "judged_steps: 6: must be at least 1 and below"),
        ({"share": 0.0}, "keep: 0.0 of 8 candidates"),
    ],
)
def test_cfg_rejection_needs_guidance_and_a_choice(changed, line):
    """Oracle: how the lines begin, by hand."""
    toy, setting = guided_toy()
    given = {"guidance_scale": 2.0, "judged_steps": 3, "share": 0.3} | changed
    with pytest.raises(UserError, match=f"^{line}"):
        selection.cfg_rejection(setting, toy, number=8, **given)


# --- interpolants


def stays(name, steps, diffusion, samples=20_000, start=0.9, end=0.3):
    """Standardised samples at `start`, carried to `end`: (before, after, path)."""
    path = interpolant.get(name)
    times = jnp.linspace(start, end, steps + 1)
    signal, noise = path.signal(times[0]), path.noise(times[0])
    spread = jnp.sqrt(signal**2 * STD**2 + noise**2)
    unit = jax.random.normal(jax.random.key(0), (samples, 1, 1, 1))

    def flow(variables, x, sigma):
        return gaussian_velocity(x, sigma[:, None, None, None], MEAN, STD)

    def one(x, inputs):
        time, following, key = inputs
        clean, eps = path.predict(flow, {}, x, time, ())
        step = path.step(x, clean, eps, time, following, diffusion * time**2)
        return transition.sample(step, jax.random.normal(key, x.shape)), None

    keys = jax.random.split(jax.random.key(1), steps)
    begin = signal * MEAN + spread * unit
    after, _ = jax.jit(lambda x: jax.lax.scan(one, x, (times[:-1], times[1:], keys)))(
        begin
    )
    return np.asarray(unit), np.asarray(after), path


@pytest.mark.parametrize("name", interpolant.INTERPOLANTS)
def test_the_sde_keeps_the_marginals_of_its_interpolant(name):
    """Oracle: closed form, N(signal mean, signal^2 std^2 + noise^2) at the same time.

    Tolerance: three standard errors of 20,000 samples and the steps' error.
    """
    _, after, path = stays(name, steps=400, diffusion=3.0)
    signal, noise = path.signal(0.3), path.noise(0.3)
    std = np.sqrt(signal**2 * STD**2 + noise**2)
    assert after.mean() == pytest.approx(float(signal) * MEAN, abs=0.015)
    assert after.std() == pytest.approx(float(std), rel=0.02)


@pytest.mark.parametrize("name", interpolant.INTERPOLANTS)
def test_without_diffusion_it_is_the_ode(name):
    """Oracle: the flow of Gaussians keeps every sample's standardised value."""
    unit, after, path = stays(name, steps=2000, diffusion=0.0, samples=50)
    signal, noise = path.signal(0.3), path.noise(0.3)
    std = np.sqrt(signal**2 * STD**2 + noise**2)
    np.testing.assert_allclose(after, signal * MEAN + std * unit, atol=2e-3)


def test_vp_keeps_unit_variance_and_reaches_both_ends():
    """Oracle: signal^2 + noise^2 = 1; the times of the paper's appendix C."""
    path = interpolant.get("vp")
    times = np.array(path.times(toy_setting(Toy(), num_steps=10).sampler))
    power = path.signal(times) ** 2 + path.noise(times) ** 2
    np.testing.assert_allclose(power, 1.0, rtol=FP32)
    ends = path.signal(times[[0, -1]]), path.noise(times[[0, -1]])
    np.testing.assert_allclose(ends, ([0, 1], [1, 0]), atol=1e-7)
    u = np.arange(10, -1, -1) / 10
    np.testing.assert_allclose(times, np.sqrt(1 - (1 - u) ** 2), atol=1e-12)


def test_the_linear_step_is_the_transition_of_training():
    """Oracle: `transition.gaussian` of kind dance with its level 3 t^2."""
    x, v = jax.random.normal(KEY, (2, 1, *SHAPE))
    time, following = jnp.float32(0.8), jnp.float32(0.65)
    clean, eps = x - time * v, x + (1 - time) * v
    found = interpolant.get("linear").step(x, clean, eps, time, following, 3 * time**2)
    wanted = transition.gaussian(
        "dance", x, v, time, following, sigma_max=0.9, noise_level=3 * time**2
    )
    np.testing.assert_allclose(found.mean, wanted.mean, atol=FP32)
    np.testing.assert_allclose(found.std, wanted.std, rtol=FP32)


def test_an_unknown_interpolant_is_one_line():
    """Oracle: the line, by hand."""
    with pytest.raises(UserError, match="^interpolant: ve: one of linear, vp$"):
        interpolant.get("ve")


# --- rollover budget forcing


@pytest.mark.parametrize("name", ["linear", "vp"])
@pytest.mark.parametrize("budget, num_steps", [(6, 6), (20, 6), (31, 4), (9, 2)])
def test_rbf_spends_exactly_its_budget(name, budget, num_steps):
    """Oracle: a counter in the network; the running best as its history tells it."""
    toy = Toy()
    seen = []

    def reward(images):
        seen.append(float(mean_reward(images)[0]))
        return mean_reward(images)

    setting = toy_setting(toy, num_steps)
    found = rollover.rollover_budget_forcing(setting, reward, budget, name)
    assert found.evaluations == toy.calls == len(seen) == budget
    assert toy.traces == 1  # one program for the particles of all steps
    spent, best = zip(*found.history, strict=True)
    assert spent[-1] == budget and len(spent) == num_steps
    assert list(best) == [max(seen[:count]) for count in spent]
    last = seen[spent[-2] :]
    assert found.scores[0] == max(last)
    assert mean_reward(found.images)[0] == found.scores[0]


def scripted(setting, scores, budget):
    values = iter(scores)
    found = rollover.rollover_budget_forcing(
        setting, lambda images: np.array([next(values)]), budget
    )
    assert next(values, None) is None
    return found


def test_rbf_rolls_what_is_left_over_to_the_next_step():
    """Oracle: by hand; 10 evaluations are 1 for the noise and 3 for each step."""
    setting = toy_setting(Toy(), num_steps=4)
    # Step 0 improves at once and leaves 2; step 1 has 5 and fails; step 2 has its 3.
    found = scripted(setting, [0, 1, *[0.5, 0.2, 0.9, 0.1, 0.3], 0.4, 2.0, 0.6], 10)
    assert found.history == ((1, 0), (2, 1), (7, 1), (10, 2.0))
    assert found.scores[0] == 2.0
    # What is left at the last step is drawn there, though the first one improves.
    found = scripted(setting, [0, 1, 2, 3, 1, 1, 1, 1, 1, 4], 10)
    assert found.history == ((1, 0), (2, 1), (3, 2), (10, 4))
    # A remainder goes to the first steps: 12 = 1 + 4 + 4 + 3.
    found = scripted(setting, [9, *[0] * 11], 12)
    assert [spent for spent, _ in found.history] == [1, 5, 9, 12]


def test_rbf_goes_on_from_the_best_particle():
    """Oracle: two runs whose scripts differ in who is best at the first step."""
    setting = toy_setting(Toy(), num_steps=3)
    first = scripted(setting, [9, 1, 0, 1, 0], 5)
    second = scripted(setting, [9, 0, 1, 1, 0], 5)
    again = scripted(setting, [9, 1, 0, 1, 0], 5)
    np.testing.assert_array_equal(first.latents, again.latents)
    assert np.abs(first.latents - second.latents).max() > 1e-3


@pytest.mark.parametrize(
    "budget, num_steps, line",
    [
        (5, 6, "budget: 5: must be at least 6, the evaluations of one image"),
        (5, 1, "num_steps: 1: must be at least 2"),
    ],
)
def test_rbf_needs_a_step_and_its_price(budget, num_steps, line):
    """Oracle: the lines, by hand."""
    with pytest.raises(UserError, match=f"^{line}"):
        rollover.rollover_budget_forcing(
            toy_setting(Toy(), num_steps), mean_reward, budget
        )


# --- direct noise optimisation


def near(target):
    def nearness(images):
        return -jnp.mean((images - target) ** 2, axis=(1, 2, 3))

    return nearness


@pytest.mark.parametrize("kind, level", [("ode", 0.0), ("dance", 0.3)])
def test_dno_raises_a_quadratic_reward(kind, level):
    """Oracle: the plain sample's reward, and 0, the largest one."""
    setting = toy_setting(Toy(), kind=kind, level=level, decode=lambda _, x: x)
    reward = near(0.7)
    plain, _ = settings.plain(setting, [0])
    free = noise_optimization.Options(regularization=0.0)
    found = noise_optimization.noise_optimization(setting, reward, 40, free)
    before = float(reward(plain)[0])
    assert found.history[0][1] == pytest.approx(before, rel=1e-4)
    assert found.scores[0] > before / 10  # an error ten times smaller
    np.testing.assert_allclose(reward(found.images), found.scores, rtol=1e-3)
    assert found.evaluations == 40 * 6 == found.history[-1][0]


def test_dno_with_its_regulariser_keeps_noise_likely():
    """Oracle: the noise's variance, which the bound for 192 blocks of 4 leaves above
    .45; without the regulariser the noise shrinks until all pixels are the target.
    """
    setting = toy_setting(Toy(), latent_shape=(16, 16, 3), decode=lambda _, x: x)
    plain, _ = settings.plain(setting, [0])
    left = {}
    for gamma in (0.0, 1.0):
        options = noise_optimization.Options(regularization=gamma)
        found = noise_optimization.noise_optimization(setting, near(0.5), 60, options)
        # The flow is linear in the noise: so is the spread of the pixels.
        left[gamma] = float((found.images.std() / plain.std()) ** 2)
    assert left[0.0] < 0.2 and left[1.0] > 0.45


def test_the_regulariser_tells_noise_from_structure():
    """Oracle: the bounds at hand; likely noise costs about nothing."""
    key = jax.random.key(0)
    price = jax.jit(noise_optimization.noise_regularizer)
    keys = jax.random.split(key, 20)
    values = [float(price(jax.random.normal(k, (24, 24, 3)), k)) for k in keys]
    assert 0 <= min(values) and np.median(values) < 0.2
    # Likely values in unlikely places: only their order gives them away.
    values = jax.random.normal(key, (24 * 24 * 3,))
    in_order = values.at[::4].set(jnp.roll(values, -1)[::4])
    for structured in (
        jnp.ones((24, 24, 3)),
        2 * jax.random.normal(key, (24, 24, 3)),
        in_order,
    ):
        assert price(structured.reshape(24, 24, 3), key) > 20


def test_the_regulariser_in_numbers():
    """Oracle: the lemma's formulas in float64; gradients exist where values are equal."""
    flat = np.random.default_rng(0).normal(size=40) * 2 + 1
    blocks = flat.reshape(10, 4)
    mean = np.linalg.norm(blocks.mean(0))
    deviation = np.linalg.norm(blocks.T @ blocks / 10 - np.eye(4), 2)
    root = max(np.sqrt(1 + deviation) - 1 - np.sqrt(4 / 10), 0)
    p1 = min(1, 2 * np.exp(-10 * mean**2 / (2 * 4)))
    p2 = min(1, 2 * np.exp(-10 * root**2 / 2))
    found = noise_optimization._surprise(jnp.asarray(flat, jnp.float32), 4)
    assert found == pytest.approx(-np.log(p1 * p2), rel=1e-4)
    gradient = jax.jit(jax.grad(noise_optimization.noise_regularizer))(
        jnp.ones((24, 24, 3)), jax.random.key(0)
    )
    assert np.isfinite(gradient).all() and (gradient > 0).all()
    with pytest.raises(UserError, match="^block: 4: must be at most half of 6 numbers"):
        noise_optimization.noise_regularizer(jnp.ones(6), jax.random.key(0))


def test_dno_needs_a_gradient():
    """Oracle: the line, by hand; a detector in numpy is no function of JAX."""
    with pytest.raises(UserError, match="^reward: mean_reward: cannot be differ"):
        noise_optimization.noise_optimization(toy_setting(Toy()), mean_reward, 3)


def test_demonstration_rewards():
    """Oracle: by hand."""
    images = jnp.stack([jnp.zeros(SHAPE), jnp.full(SHAPE, 0.25)])
    np.testing.assert_allclose(noise_optimization.brightness(images), [0, 0.25])
    np.testing.assert_allclose(noise_optimization.darkness(images), [1, 0.75])


# --- budgets


@pytest.mark.parametrize("budget", [6, 7, 29, 30, 31, 50])
def test_a_budget_buys_the_most_candidates(budget):
    """Oracle: every larger number, priced by the formula."""

    def price(number):
        return 3 * number + int(np.ceil(0.25 * number)) * 3

    number = methods.candidates(budget, 6, 3, 0.25)
    assert price(number) <= budget < price(number + 1)


@pytest.mark.parametrize("method", methods.METHODS)
def test_no_search_spends_more_than_its_budget(method):
    """Oracle: the budget and, one latent at a time, the network's counter."""
    toy, setting = guided_toy()
    guidance = methods.Guidance(toy, 2.0, judged_steps=3)
    found = methods.search(method, setting, 20, mean_reward, guidance, near(0.5))
    assert 15 <= found.evaluations <= 20
    if method != "noise_optimization":  # which also recomputes for its gradient
        assert toy.calls == found.evaluations
    assert found.images.shape[1:] == SHAPE
    with pytest.raises(UserError, match="^budget: 5: must be at least 6"):
        methods.search(method, setting, 5, mean_reward, guidance, near(0.5))
