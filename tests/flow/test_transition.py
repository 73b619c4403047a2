"""Transitions against golden numbers, the Euler step and closed-form Gaussians."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import schedule, transition

KINDS = tuple(transition.TRANSITIONS)
# A few float32 roundings (6e-8 each) of terms of order 1; the golden numbers with
# ten digits are finer than that.
FP32 = 4e-7
# Half a unit of the sixth printed decimal, above it for values of order 1.
SIX_DIGITS = 0.5e-6 + FP32
SD3_10 = schedule.shifted_grid(10)


def step(kind, x, v, sigma, sigma_next, noise_level, sigma_max=0.96):
    return transition.gaussian(
        kind,
        jnp.asarray(x, jnp.float32),
        jnp.asarray(v, jnp.float32),
        sigma,
        sigma_next,
        sigma_max=sigma_max,
        noise_level=noise_level,
    )


def close(actual, golden, tolerance=FP32):
    np.testing.assert_allclose(actual, golden, rtol=tolerance, atol=tolerance)


def table(text):
    return np.array(text.split(), np.float64).reshape(10, -1)


# sigma, dt; Flow-SDE (a = 0.7) sigma_t, std, c_x, c_v, log-prob at noise 0;
# CPS (0.8) std, c_x, c_v: of the ten steps of SD3.5-M, mean = c_x * x + c_v * v.
COEFFICIENTS = table("""
1.000000 -.039871 3.505672 .700000 .755000 -.039871 -.562264 .913137 .336567 -.039871
 .960129 -.046780 3.435074 .742964 .712541 -.058242 -.621831 .868646 .368891 -.071943
 .913349 -.055657 2.272634 .536152 .842634 -.069293 -.295602 .815714 .407349 -.107010
 .857692 -.067324 1.718500 .445897 .884093 -.083818 -.111272 .751685 .453869 -.145043
 .790368 -.083090 1.359203 .391794 .902892 -.103447  .018080 .672662 .511283 -.185540
 .707278 -.105128 1.088093 .352797 .912011 -.130884  .122924 .572679 .583924 -.226922
 .602151 -.137275  .861175 .319070 .915465 -.170907  .223406 .442123 .678779 -.265072
 .464876 -.186827  .652438 .282007 .914463 -.232600  .346886 .264440 .807873 -.289639
 .278049 -.269120  .434415 .225360 .908672 -.335055  .571115 .008492 .993831 -.273574
 .008929 -.008929  .066441 .006278 .997793 -.011116 4.151751 0       1.0     -.008929
""")


@pytest.mark.parametrize("i", range(10))
def test_coefficients_of_sd3(i):
    """Oracle: golden_numbers.md 3."""
    sigma, sigma_next = SD3_10[i : i + 2]
    gold = COEFFICIENTS[i]
    close([sigma, sigma_next - sigma], gold[:2], SIX_DIGITS)

    def coefficients(kind, noise_level):
        on_x, on_v = (
            step(kind, x, v, sigma, sigma_next, noise_level, SD3_10[1])
            for x, v in ((1.0, 0.0), (0.0, 1.0))
        )
        return on_x, on_x.mean, on_v.mean

    flow, c_x, c_v = coefficients("sde", 0.7)
    log_prob = transition.log_prob("sde", flow.mean, flow)
    close([flow.diffusion, flow.std, c_x, c_v, log_prob], gold[2:7], SIX_DIGITS)
    cps, c_x, c_v = coefficients("cps", 0.8)
    close([cps.std, c_x, c_v], gold[7:], SIX_DIGITS)
    assert cps.diffusion == cps.std


@pytest.mark.parametrize(
    "sigmas, golden",
    [
        (
            schedule.by_tokens(6, 1024),
            """2.900745 2.757594 1.744055 1.233233 .872028 .551519
        .900000 .931196 .646043 .505883 .400768 .288167""",
        ),
    ],
    ids=["flux"],
)
def test_flow_sde_of_flux(sigmas, golden):
    """Oracle: golden_numbers.md 1; sigma_t, then std, for a = 0.9."""
    steps = [step("sde", 0.0, 0.0, s, t, 0.9, sigmas[1]) for s, t in pairs(sigmas)]
    actual = [g.diffusion for g in steps] + [g.std for g in steps]
    close(actual, np.array(golden.split(), np.float64), SIX_DIGITS)


@pytest.mark.parametrize(
    "num_steps, golden",
    [
        (
            16,
            """.7000 .7231 .5170 .4266 .3732 .3369 .3100 .2888 .2711 .2556 .2412 .2267
        .2111 .1924 .1673 .1278""",
        ),
        (10, ".7000 .7384 .5317 .4415 .3877 .3500 .3195 .2905 .2562 .2021"),
    ],
)
def test_flow_sde_of_g2rpo(num_steps, golden):
    """Oracle: golden_numbers.md 2; std for shift 3, a = 0.7."""
    sigmas = schedule.shifted(num_steps, 3.0)
    steps = [step("sde", 0.0, 0.0, s, t, 0.7, sigmas[1]) for s, t in pairs(sigmas)]
    close([g.std for g in steps], np.array(golden.split(), np.float64), 0.5e-4 + FP32)


def test_dance_at_the_ends_of_its_schedule():
    """Oracle: golden_numbers.md 2; std for T = 16, shift 3, eta = 0.3."""
    sigmas = schedule.shifted(16, 3.0)
    steps = [step("dance", 0.0, 0.0, s, t, 0.3) for s, t in pairs(sigmas)]
    close([steps[0].std, steps[-1].std], [0.0442, 0.1225], 0.5e-4 + FP32)


# kind, level: (mean, std, next, log-prob) of the worked examples A to D.
EXAMPLES = {
    "A": (
        (0.3, -0.8, 0.75, 0.5, 1.2),
        {
            ("ode", 0.0): (0.5, 0.0, 0.5, 0.0),
            ("sde", 0.7): (0.4755, 0.6062177826, 1.2029613392, -1.1384225530),
            ("cps", 0.8): (0.4654508497, 0.4755282581, 1.0360847595, -0.3256230590),
            ("dance", 0.3): (0.4985, 0.15, 0.6785, 0.2581814517),
        },
    ),
    "B": (
        (0.5, -1.0, SD3_10[5], SD3_10[6], -0.4),
        {
            ("ode", 0.0): (0.6051279306, 0.0, 0.6051279306, 0.0),
            ("sde", 0.7): (0.5868896540, 0.3527970985, 0.4457708145, 0.0429236458),
            ("cps", 0.8): (0.5188843664, 0.5726792133, 0.2898126810, -0.0524738370),
            ("dance", 0.3): (0.6037415119, 0.0972703128, 0.5648333868, 1.3313229128),
        },
    ),
    "C": (
        (1.0, 0.25, SD3_10[0], SD3_10[1], 0.5),
        {
            ("ode", 0.0): (0.9900323302, 0.0, 0.9900323302, 0.0),
            ("sde", 0.7): (0.7450323302, 0.7, 1.0950323302, -0.6872635893),
            ("cps", 0.8): (0.3265992864, 0.9131372469, 0.7831679098, -0.2084549079),
        },
    ),
    "D": (
        (0.2, 0.1, SD3_10[9], SD3_10[10], -1.0),
        {
            # std = 0.006 turns the rounding of next (1.5e-8) into 2e-6 of log-prob.
            ("sde", 0.7): (0.1984469513, 0.0062780903, 0.1921688610, 3.6517509021),
            ("cps", 0.8): (0.1991071428, 0.0, 0.1991071428, 0.0),
        },
    ),
}


@pytest.mark.parametrize(
    "name, kind, level",
    [
        (name, kind, level)
        for name, (_, rows) in EXAMPLES.items()
        for kind, level in rows
    ],
)
def test_worked_scalar_examples(name, kind, level):
    """Oracle: golden_numbers.md 4."""
    (x, v, sigma, sigma_next, noise), rows = EXAMPLES[name]
    mean, std, next_latent, log_prob = rows[kind, level]
    g = step(kind, x, v, sigma, sigma_next, level, SD3_10[1])
    drawn = transition.sample(g, jnp.float32(noise))
    close([g.mean, g.std, drawn], [mean, std, next_latent])
    tolerance = 3e-6 if (name, kind) == ("D", "sde") else FP32
    close(transition.log_prob(kind, drawn, g), log_prob, tolerance)


def test_diffusion_of_the_worked_examples():
    """Oracle: golden_numbers.md 4 (std_dev_t)."""
    close(step("sde", 0.3, -0.8, 0.75, 0.5, 0.7).diffusion, 1.2124355653)
    first = step("sde", 1.0, 0.25, 1.0, SD3_10[1], 0.7, SD3_10[1])
    close(first.diffusion, 3.5056715330)
    close(step("dance", 0.3, -0.8, 0.75, 0.5, 0.3).diffusion, 0.3)


@pytest.mark.parametrize(
    "kind, level, mean, next_latent, log_prob",
    [
        (
            "sde",
            0.7,
            [0.68875, -0.344375, 0.6771875, -0.6225],
            [0.446263, -0.283753, 1.586514, -1.834936],
            -1.2209225530,
        ),
        (
            "cps",
            0.8,
            [0.663627, -0.331814, 0.570415, -0.672746],
            [0.473416, -0.284261, 1.283708, -1.623802],
            -0.3629340345,
        ),
    ],
)
def test_worked_tensor_example(kind, level, mean, next_latent, log_prob):
    """Oracle: golden_numbers.md 4."""
    x = np.array([[[0.5, -0.25], [1, 0]]])
    v = np.array([[[-1, 0.5], [0.25, 2]]])
    noise = jnp.array([[[-0.4, 0.1], [1.5, -2]]])
    g = step(kind, x, v, 0.75, 0.5, level)
    drawn = transition.sample(g, noise)
    close(g.mean.ravel(), mean, SIX_DIGITS)
    close(drawn.ravel(), next_latent, SIX_DIGITS)
    close(transition.log_prob(kind, drawn, g), log_prob)


def random_latents(*shape):
    keys = jax.random.split(jax.random.key(0), 2)
    return [jax.random.normal(key, shape) for key in keys]


def pairs(sigmas):
    return itertools.pairwise(sigmas)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_level_zero_is_the_euler_step_bit_for_bit(kind, jit):
    """Oracle: x + v * dt, compiled alike; every step of the schedule."""
    x, v = random_latents(8, 8, 4)
    compiled = jax.jit if jit else lambda function: function

    @compiled
    def ours(x, v, sigma, sigma_next, level):
        g = step(kind, x, v, sigma, sigma_next, level, SD3_10[1])
        return transition.sample(g, jnp.ones_like(x)), g.std

    euler = compiled(lambda x, v, sigma, sigma_next: x + v * (sigma_next - sigma))
    for sigma, sigma_next in pairs(SD3_10):
        drawn, std = ours(x, v, sigma, sigma_next, jnp.float32(0))
        np.testing.assert_array_equal(drawn, euler(x, v, sigma, sigma_next))
        assert std == 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_at_noise_level_zero(kind):
    """Oracle: closed form; d mean / d v = dt, log-prob is 0 with zero gradient."""
    x, v = random_latents(4)

    def mean(v, level, sigma, sigma_next):
        return step(kind, x, v, sigma, sigma_next, level, SD3_10[1]).mean.sum()

    def log_prob(v, level, sigma, sigma_next):
        g = step(kind, x, v, sigma, sigma_next, level, SD3_10[1])
        return transition.log_prob(kind, x, g)

    for nodes in pairs(SD3_10):
        by_v, by_level = jax.grad(mean, (0, 1))(v, 0.0, *nodes)
        np.testing.assert_allclose(by_v, nodes[1] - nodes[0], rtol=1e-6)
        assert jnp.isfinite(by_level)
        value, (by_v, by_level) = jax.value_and_grad(log_prob, (0, 1))(v, 0.0, *nodes)
        assert value == 0 and not by_v.any() and jnp.isfinite(by_level)


@pytest.mark.parametrize("kind", ["sde", "dance", "cps"])
def test_small_noise_level_approaches_the_euler_step(kind):
    """Oracle: limit; mean and std differ from Euler's by O(noise level)."""
    x, v = random_latents(16)
    for sigma, sigma_next in pairs(SD3_10):
        g = step(kind, x, v, sigma, sigma_next, 1e-3, SD3_10[1])
        euler = x + v * (sigma_next - sigma)
        np.testing.assert_allclose(g.mean, euler, atol=3e-5)
        assert g.std < 6e-3


def test_cps_keeps_the_amounts_of_data_and_noise():
    """Oracle: closed form; with exact predictions 1 - sigma' and sigma' remain."""
    for sigma, sigma_next in pairs(SD3_10):
        data = step("cps", 1 - sigma, -1.0, sigma, sigma_next, 0.8).mean
        noise = step("cps", sigma, 1.0, sigma, sigma_next, 0.8)
        close(data, 1 - sigma_next)
        close(jnp.hypot(noise.mean, noise.std), sigma_next)


@pytest.mark.parametrize(
    "sigmas, index, left",
    [
        (SD3_10, 8, 0.240),
        (schedule.shifted(10, 3.0), 9, 0.218),
        (schedule.shifted(16, 3.0), 15, 0.137),
    ],
)
def test_flow_sde_leaves_excess_noise(sigmas, index, left):
    """Oracle: golden_numbers.md 2."""
    sigma, sigma_next = sigmas[index : index + 2]
    data = step("sde", 1 - sigma, -1.0, sigma, sigma_next, 0.7, sigmas[1]).mean
    noise = step("sde", sigma, 1.0, sigma, sigma_next, 0.7, sigmas[1])
    close(data, 1 - sigma_next)
    close(jnp.hypot(noise.mean, noise.std), left, 0.5e-3)


@pytest.mark.parametrize("kind, level", [("sde", 0.7), ("dance", 0.3)])
def test_every_step_of_an_sde_adds_excess_noise(kind, level):
    """Oracle: closed form, golden_numbers.md 2; with exact predictions 1 - sigma' of the
    data remains, and above sigma'^2 of noise what Euler's step leaves behind."""
    sigmas = schedule.shifted(10, 3.0)
    for sigma, sigma_next in pairs(np.float64(sigmas)):
        data = step(kind, 1 - sigma, -1.0, sigma, sigma_next, level, sigmas[1]).mean
        noise = step(kind, sigma, 1.0, sigma, sigma_next, level, sigmas[1])
        dt, s = sigma_next - sigma, np.float64(noise.diffusion)
        excess = s**2 * dt**2 / sigma + s**4 * dt**2 / (4 * sigma**2)
        close(data, 1 - sigma_next)
        close(noise.mean**2 + noise.std**2, sigma_next**2 + excess, 1e-6)


@pytest.mark.parametrize(
    "kind, level, num_steps, final_std",
    [
        ("ode", 0.0, 1000, 0.499),
        ("sde", 0.7, 1000, 0.499),
        ("cps", 0.8, 1000, 0.400),
        ("cps", 0.3, 1000, 0.483),
        ("cps", 1.0, 1000, 0.350),
        ("ode", 0.0, 10, 0.369),
        ("sde", 0.7, 10, 0.425),
        ("cps", 0.8, 10, 0.314),
    ],
)
def test_marginals_on_a_gaussian_flow(kind, level, num_steps, final_std):
    """Oracle: golden_numbers.md 12; data of std 0.5, exact velocity.

    The SDE keeps the marginals of the flow as steps get finer; CPS does not.
    """
    sigmas = schedule.shifted(num_steps, 3.0)
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    # E[noise - data | x] = slope * x for independent data and noise.
    variance = 0.25 * (1 - sigma) ** 2 + sigma**2
    slope = (sigma - 0.25 * (1 - sigma)) / variance
    g = jax.vmap(lambda v, s, t: step(kind, 1.0, v, s, t, level, sigmas[1]))(
        slope, sigma, sigma_next
    )
    std = 1.0
    for factor, fresh in zip(np.float64(g.mean), np.float64(g.std), strict=True):
        std = np.hypot(factor * std, fresh)
    # The golden numbers are sampled: good to 1e-3.
    np.testing.assert_allclose(std, final_std, atol=1e-3)


def test_log_prob_takes_no_gradient_through_the_action():
    """Oracle: closed form; only the mean pulls, with (next - mean) / std^2 / n."""
    g = step("sde", [0.3, 0.1], [-0.8, 0.4], 0.75, 0.5, 0.7)
    action = jnp.array([1.2, -0.3])

    def log_prob(action, mean):
        return transition.log_prob("sde", action, g.replace(mean=mean))

    by_action, by_mean = jax.grad(log_prob, (0, 1))(action, g.mean)
    assert not by_action.any()
    close(by_mean, (action - g.mean) / g.std**2 / 2)


def test_cps_gaussian_is_the_density_of_the_same_draw():
    """Oracle: jax.scipy.stats.norm on worked example A, which "cps" also draws."""
    x, v, sigma, sigma_next, noise = EXAMPLES["A"][0]
    released = step("cps", x, v, sigma, sigma_next, 0.8)
    full = step("cps_gaussian", x, v, sigma, sigma_next, 0.8)
    assert (full.mean, full.std, full.diffusion) == (
        released.mean,
        released.std,
        released.diffusion,
    )
    drawn = transition.sample(full, jnp.float32(noise))
    density = jax.scipy.stats.norm.logpdf(drawn, full.mean, full.std)
    close(transition.log_prob("cps_gaussian", drawn, full), density)
    square = transition.log_prob("cps", drawn, full)
    constants = -jnp.log(full.std) - jnp.log(2 * jnp.pi) / 2
    close(square / (2 * full.std**2) + constants, density)


# kind, level: gains of the ten steps of shift 3, golden_numbers.md 8. The last step of
# CPS is deterministic.
GAINS = {
    ("sde", 0.7): ".051 .069 .113 .160 .219 .296 .406 .574 .868 1.540",
    ("dance", 0.3): ".630 .678 .734 .800 .879 .977 1.100 1.263 1.493 1.892",
    ("cps_gaussian", 0.8): ".039 .073 .114 .164 .228 .313 .437 .646 1.166 0",
    ("cps", 0.8): ".066 .112 .157 .198 .232 .252 .250 .215 .132 0",
}


@pytest.mark.parametrize("kind, level", GAINS)
def test_gain(kind, level):
    """Oracles: golden_numbers.md 8; the gradient of the log-prob."""
    sigmas = schedule.shifted(10, 3.0)
    x, v = random_latents(6)
    noise = jax.random.normal(jax.random.key(1), (6,))
    gold = np.array(GAINS[kind, level].split(), np.float64)
    for (sigma, sigma_next), golden in zip(pairs(sigmas), gold, strict=True):
        g = step(kind, x, v, sigma, sigma_next, level, sigmas[1])
        drawn = transition.sample(g, noise)

        def log_prob(v, sigma=sigma, sigma_next=sigma_next, drawn=drawn):
            g = step(kind, x, v, sigma, sigma_next, level, sigmas[1])
            return transition.log_prob(kind, drawn, g)

        actual = transition.gain(
            kind, sigma, sigma_next, sigma_max=sigmas[1], noise_level=level
        )
        np.testing.assert_allclose(actual, golden, atol=0.6e-3)
        # drawn - mean loses digits against latents of order 1.
        np.testing.assert_allclose(
            jax.grad(log_prob)(v), -actual * noise / 6, rtol=1e-4, atol=2e-6
        )


def test_gain_times_the_guard_weight_is_constant():
    """Oracle: closed form, golden_numbers.md 8; gain * std / h = 1 + a^2 / 2, first 1."""
    sigmas = schedule.shifted(10, 3.0)
    options = {"sigma_max": sigmas[1], "noise_level": 0.7}
    actual = [
        transition.gain("sde", s, t, **options)
        * step("sde", 0.0, 0.0, s, t, 0.7, sigmas[1]).std
        / (s - t)
        for s, t in pairs(sigmas)
    ]
    np.testing.assert_allclose(actual, [1.0] + 9 * [1.245], rtol=2e-6)


def solve(sigmas, velocity, x, second_order):
    """From sigmas[0] to sigmas[-1] with the two-step solver, or with Euler's."""
    x_before, v_before, before = x, np.zeros_like(x), 1.0
    for sigma, sigma_next in pairs(sigmas):
        v = velocity(x, sigma)
        if not second_order:
            before = 1.0
        following = transition.dpm_solver_2m(
            *(jnp.asarray(a, jnp.float32) for a in (x, v, x_before, v_before)),
            sigma,
            sigma_next,
            before,
        )
        x_before, v_before, before = x, v, sigma
        x = np.asarray(following, np.float64)
    return x


def gaussian_flow(x, sigma):
    """Exact velocity for data N(1, 0.5^2), in float64."""
    variance = 0.25 * (1 - sigma) ** 2 + sigma**2
    slope = (sigma - 0.25 * (1 - sigma)) / variance
    return -1.0 + slope * (x - (1 - sigma))


def gaussian_flow_from(x, sigma, sigma_next):
    """Where the flow takes x: its distance to the mean goes with the std."""
    std, std_next = (np.hypot(0.5 * (1 - s), s) for s in (sigma, sigma_next))
    return 1 - sigma_next + (x - (1 - sigma)) * std_next / std


@pytest.mark.parametrize("second_order, order", [(False, 1), (True, 2)])
def test_order_of_dpm_solver(second_order, order):
    """Oracle: the exact flow of Gaussian data; errors fall by 2^order with half steps."""
    x = np.array([0.7])
    errors = []
    for num_steps in (10, 20, 40):
        sigmas = np.linspace(0.9, 0.4, num_steps + 1)
        exact = gaussian_flow_from(x, 0.9, 0.4)
        errors.append(abs(solve(sigmas, gaussian_flow, x, second_order) - exact).item())
    np.testing.assert_allclose(
        np.log2(errors[:-1]) - np.log2(errors[1:]), order, atol=0.1
    )


def test_dpm_solver_over_a_whole_schedule():
    """Oracle: the exact flow; from noise to data it is far nearer than Euler."""
    x = np.array([-1.5, 0.4, 2.0])
    sigmas = schedule.shifted(20, 3.0)
    exact = gaussian_flow_from(x, 1.0, 0.0)
    euler, second = (
        abs(solve(sigmas, gaussian_flow, x, order) - exact) for order in (False, True)
    )
    assert (second < euler / 4).all(), (second, euler)


def test_dpm_solver_is_that_of_the_paper():
    """Oracle: arXiv 2211.01095, algorithm 2, in float64 and in its own lambdas."""

    def paper(x, v, x_before, v_before, s, t, r):
        def lam(sigma):
            return np.log((1 - sigma) / sigma)

        h, h_before = lam(t) - lam(s), lam(s) - lam(r)
        data, data_before = x - s * v, x_before - r * v_before
        ratio = h_before / h
        d = (1 + 1 / (2 * ratio)) * data - 1 / (2 * ratio) * data_before
        return t / s * x - (1 - t) * (np.exp(-h) - 1) * d

    x, v, x_before, v_before = np.random.default_rng(0).normal(size=(4, 5))
    for r, s, t in [(0.95, 0.9, 0.8), (0.9, 0.5, 0.45), (0.3, 0.2, 0.01)]:
        arrays = (jnp.asarray(a, jnp.float32) for a in (x, v, x_before, v_before))
        actual = transition.dpm_solver_2m(*arrays, s, t, r)
        np.testing.assert_allclose(
            actual, paper(x, v, x_before, v_before, s, t, r), rtol=2e-5, atol=2e-6
        )


@pytest.mark.parametrize(
    "sigma_previous, sigma, sigma_next",
    [(1.0, 1.0, 0.96), (1.0, 0.96, 0.9), (0.5, 0.25, 0.0), (0.5, 0.5, 0.25)],
    ids=["first", "second", "last", "no-history"],
)
def test_dpm_solver_without_two_usable_predictions(sigma_previous, sigma, sigma_next):
    """Oracle: the Euler step; the last one ends at the predicted data."""
    x, v = random_latents(5)
    actual = jax.jit(transition.dpm_solver_2m)(
        x, v, 2 * x, 3 * v, sigma, sigma_next, sigma_previous
    )
    close(actual, x + v * (sigma_next - sigma))
    if sigma_next == 0:
        close(actual, x - sigma * v)


def test_bfloat16_inputs_are_computed_in_float32():
    """Oracle: float32 of the same rounded inputs, bit for bit."""
    x, v = (a.astype(jnp.bfloat16) for a in random_latents(32))
    for kind in KINDS:
        low = transition.gaussian(
            kind, x, v, 0.75, 0.5, sigma_max=0.96, noise_level=0.7
        )
        high = step(kind, x, v, 0.75, 0.5, 0.7)
        assert low.mean.dtype == low.std.dtype == jnp.float32
        np.testing.assert_array_equal(low.mean, high.mean)


@pytest.mark.parametrize("kind", KINDS)
def test_vmapped_group_equals_single_samples(kind):
    """Oracle: invariance under vmap, with one noise level per sample."""
    x, v = random_latents(3, 5)
    levels = jnp.array([0.0, 0.4, 0.9])
    group = jax.vmap(lambda x, v, a: step(kind, x, v, 0.75, 0.5, a))(x, v, levels)
    log_probs = jax.vmap(lambda n, g: transition.log_prob(kind, n, g))(x, group)
    for i in range(3):
        one = step(kind, x[i], v[i], 0.75, 0.5, levels[i])
        close(group.mean[i], one.mean)
        close(log_probs[i], transition.log_prob(kind, x[i], one))


def test_unknown_kind():
    """Oracle: the text of the error a user reads."""
    with pytest.raises(UserError, match="sde_type: ddim: one of ode, sde, cps, dance"):
        step("ddim", 0.0, 0.0, 0.75, 0.5, 0.7)
