"""Other paths between data and noise than the flow's own, without new training.

An interpolant says how much signal and noise x_t = signal(t) x_0 + noise(t) eps has.
The flow knows the linear one, 1 - t and t. Any other one is the same path at another
speed and scale (arXiv 2503.19385, section 4.3): x_t / (signal + noise) is a latent of
the flow at sigma = noise / (signal + noise), where the network is asked, and its
answers x_0_hat and eps_hat do not depend on scale or speed. Hence

    velocity(t) = signal'(t) x_0_hat + noise'(t) eps_hat
    score(t)    = -eps_hat / noise(t)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import transition
from flowgrpo_jax.flow.rollout import Sampler
from flowgrpo_jax.inference.search.setting import Latents

Time = Float[Array, ""]


class Interpolant(NamedTuple):
    """Signal and noise at time t, from 1 (pure noise) to 0, and the times to visit."""

    signal: Callable[[Time], Time]
    noise: Callable[[Time], Time]
    times: Callable[[Sampler], tuple[float, ...]]  # decreasing, from 1 to 0

    def velocity(self, clean: Latents, eps: Latents, time: Time) -> Latents:
        """signal' x_0_hat + noise' eps_hat."""
        one = jnp.ones_like(time)
        _, signal = jax.jvp(self.signal, (time,), (one,))
        _, noise = jax.jvp(self.noise, (time,), (one,))
        return signal * clean + noise * eps

    def predict(
        self,
        velocity: Callable[..., Array],
        variables: Any,
        latents: Latents,
        time: Time,
        text: tuple,
    ) -> tuple[Latents, Latents]:
        """(x_0_hat, eps_hat) of latents of this interpolant: one evaluation each.

        `velocity` is that of the flow. x_0_hat is the posterior mean (Tweedie).
        """
        signal, noise = self.signal(time), self.noise(time)
        scale = signal + noise
        sigma, inside = noise / scale, latents / scale
        flow = velocity(variables, inside, jnp.full(latents.shape[0], sigma), *text)
        return inside - sigma * flow, inside + (1 - sigma) * flow

    def step(
        self,
        latents: Latents,
        clean: Latents,
        eps: Latents,
        time: Time,
        time_next: Time,
        diffusion: Time,
    ) -> transition.Gaussian:
        """One Euler-Maruyama step of the SDE with this interpolant's marginals.

        dx = [velocity + g^2 / (2 noise) eps_hat] dt + g dw for any g = `diffusion`; 0
        is the ODE. For the linear interpolant this is the transition "dance" (equations
        7 to 9 of arXiv 2503.19385).
        """
        dt = time_next - time
        drift = self.velocity(clean, eps, time)
        drift += diffusion**2 / (2 * self.noise(time)) * eps
        std = diffusion * jnp.sqrt(-dt)
        return transition.Gaussian(latents + drift * dt, std, diffusion)


def _own_times(sampler: Sampler) -> tuple[float, ...]:
    return sampler.sigmas


def _denser_at_noise(sampler: Sampler) -> tuple[float, ...]:
    """t = sqrt(1 - (1 - u)^2) for equally spaced u: small steps where g is large."""
    even = np.linspace(1, 0, len(sampler.sigmas))
    return tuple(float(t) for t in np.sqrt(1 - (1 - even) ** 2))


INTERPOLANTS = {
    "linear": Interpolant(lambda t: 1 - t, lambda t: t, _own_times),
    # The paper wants some signal^2 + noise^2 = 1 and both ends reached. Diffusion models'
    # usual beta from 0.1 to 20 reaches neither and leaves sigma 0.7 for the last of 10
    # steps; with it the embedded model's best images were worse (reward .64, not .92).
    "vp": Interpolant(
        lambda t: jnp.cos(jnp.pi / 2 * t),
        lambda t: jnp.sin(jnp.pi / 2 * t),
        _denser_at_noise,
    ),
}


def get(name: str) -> Interpolant:
    """The interpolant of that name; UserError for another one."""
    if name not in INTERPOLANTS:
        raise UserError(f"interpolant: {name}: one of {', '.join(INTERPOLANTS)}")
    return INTERPOLANTS[name]
