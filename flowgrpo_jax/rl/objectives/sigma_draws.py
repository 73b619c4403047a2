"""At which sigma a clean sample is noised: the draws and their options.

A draw takes three keys, of which it uses what it needs, and the options of the
objective, which inherit those of its draw.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Key

from flowgrpo_jax.flow.schedule import shift_sigma
from flowgrpo_jax.rl.objectives.options import number


@dataclass(frozen=True, kw_only=True)
class SigmaInRange:
    """Bounds of sigma, and how it is spread between them."""

    sigma: Literal["uniform", "logit_normal"] = "uniform"
    sigma_min: float = number(0.0, most=1, below=True)
    sigma_max: float = number(1.0, most=1, above=True)


def sigma_in_range(
    keys: Key[Array, " three"], options: SigmaInRange
) -> Float32[Array, ""]:
    """A sigma between two bounds, uniform or more often near their middle.

    sigma = sigma_min + (sigma_max - sigma_min) * u, where u is uniform in [0, 1] or
    the sigmoid of a standard normal number.
    """
    if options.sigma == "uniform":
        unit = jax.random.uniform(keys[0])
    else:
        unit = jax.nn.sigmoid(jax.random.normal(keys[0]))
    return options.sigma_min + (options.sigma_max - options.sigma_min) * unit


@dataclass(frozen=True, kw_only=True)
class PretrainingSigma:
    """The shift towards noise, and the share of draws that are uniform."""

    shift: float = number(most=1000, above=True)
    uniform_share: float = number(0.1, most=1)


def pretraining_sigma(
    keys: Key[Array, " three"], options: PretrainingSigma
) -> Float32[Array, ""]:
    """Logit-normal (arXiv 2403.03206), shifted to higher noise as in sampling.

    A share of draws is uniform, so that no sigma is left out.
    """
    sigma = shift_sigma(jax.nn.sigmoid(jax.random.normal(keys[0])), options.shift)
    flat = jax.random.uniform(keys[1])
    return jnp.where(jax.random.uniform(keys[2]) < options.uniform_share, flat, sigma)
