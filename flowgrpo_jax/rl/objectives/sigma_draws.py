"""At which sigma a clean sample is noised: the draws and their options.

A draw takes what tells this one from others (`Draw`), the options of the objective,
which inherit those of its draw, the sigmas of the sampler and how often every sample is
drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, Key

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow.schedule import shift_sigma
from flowgrpo_jax.rl.objectives.options import number


class Draw(NamedTuple):
    """One draw of a sample: keys of its own, its sample's key and its number there."""

    keys: Key[Array, " three"]
    sample_key: Key[Array, ""]  # the same for all draws of a sample
    number: Int[Array, ""]


@dataclass(frozen=True, kw_only=True)
class SigmaInRange:
    """How sigma is spread, and between which bounds.

    "uniform" and "logit_normal" are numbers of [`sigma_min`, `sigma_max`], shifted
    towards noise by `shift` before (1 is not). "nodes" and "stratified" are sigmas at
    which the sampler asked the network: those whose number is from `node_min` to
    `node_max` of the number of steps, both included.
    """

    sigma: Literal["uniform", "logit_normal", "nodes", "stratified"] = "uniform"
    sigma_min: float = number(0.0, most=1, below=True)
    sigma_max: float = number(1.0, most=1, above=True)
    shift: float = number(1.0, most=1000, above=True)
    node_min: float = number(0.0, most=1, below=True)
    node_max: float = number(1.0, most=1, above=True)


def sigma_in_range(
    draw: Draw, options: SigmaInRange, sigmas: Sequence[float], draws: int
) -> Float32[Array, ""]:
    """A sigma as `options` say; `sigmas` are the sampler's, from 1 to 0.

    sigma = sigma_min + (sigma_max - sigma_min) * shifted(u), where u is uniform in
    [0, 1] or the sigmoid of a standard normal number. Of the sampler's nodes the draws
    of a sample are different ones, in random order ("nodes"; more draws than nodes
    begin again), or one of each of `draws` equal stretches of them ("stratified").
    """
    if options.sigma in ("nodes", "stratified"):
        nodes = nodes_in_range(options, sigmas)
        count = len(nodes)
        if options.sigma == "nodes":
            order = jax.random.permutation(draw.sample_key, count)
            place = order[draw.number % count]
        else:
            unit = draw.number % draws + jax.random.uniform(draw.keys[0])
            # The product may round up to the end of the last stretch.
            place = jnp.minimum((unit * count / draws).astype(int), count - 1)
        return jnp.asarray(nodes, jnp.float32)[place]
    if options.sigma == "uniform":
        unit = jax.random.uniform(draw.keys[0])
    else:
        unit = jax.nn.sigmoid(jax.random.normal(draw.keys[0]))
    unit = jnp.asarray(shift_sigma(unit, options.shift))
    return options.sigma_min + (options.sigma_max - options.sigma_min) * unit


def nodes_in_range(options: SigmaInRange, sigmas: Sequence[float]) -> tuple[float, ...]:
    """The sampler's sigmas that `node_min` and `node_max` allow; the clean end never.

    UserError if there are none.
    """
    steps = len(sigmas) - 1
    low, high = options.node_min * steps, options.node_max * steps
    nodes = tuple(s for k, s in enumerate(sigmas[:-1]) if low <= k <= high)
    if not nodes:
        raise UserError(
            f"train.objective_options.node_min: {options.node_min}: no step of {steps} "
            f"lies between it and node_max ({options.node_max})"
        )
    return nodes


@dataclass(frozen=True, kw_only=True)
class PretrainingSigma:
    """The shift towards noise, and the share of draws that are uniform."""

    shift: float = number(most=1000, above=True)
    uniform_share: float = number(0.1, most=1)


def pretraining_sigma(
    draw: Draw, options: PretrainingSigma, sigmas: Sequence[float], draws: int
) -> Float32[Array, ""]:
    """Logit-normal (arXiv 2403.03206), shifted to higher noise as in sampling.

    A share of draws is uniform, so that no sigma is left out.
    """
    del sigmas, draws  # pretraining has no sampler
    keys = draw.keys
    sigma = shift_sigma(jax.nn.sigmoid(jax.random.normal(keys[0])), options.shift)
    flat = jax.random.uniform(keys[1])
    return jnp.where(jax.random.uniform(keys[2]) < options.uniform_share, flat, sigma)
