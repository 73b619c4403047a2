"""Learning: what a rollout gave to new parameters, in one compiled program.

For every optimizer step: each device loops over its microbatches of entries, fetches
the latents they point to, adds up gradients in fp32, the mesh sums them, optax makes
the step, the EMA follows. A microbatch whose weights are all zero (no advantage, or
padding) is skipped, not multiplied by zero.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array

from flowgrpo_jax.rl import measurements
from flowgrpo_jax.rl.summation import ROUNDED, Summation

# An array of the host before it is placed on the mesh, of the device after.
Column = Any
Gradients = Callable[..., tuple[Any, dict[str, Array]]]


@struct.dataclass
class TrainState:
    """Everything that the optimizer changes: parameters, their EMA and its own state.

    `updates` counts optimizer steps. `behaviour` is what samples, where that is not
    the learner (else None). Fields are untyped since shardings, shapes and checkpoint
    arguments take the place of the arrays in trees of this form.
    """

    trainable: Any
    optimizer: Any
    ema: Any
    updates: Any
    behaviour: Any = None


class Ema(NamedTuple):
    """Flow-GRPO's EMA: every `every` updates by min((1 + k) / (10 + k), decay).

    Before the first of these it moves at every update, by the same formula: the average
    of a run of a few updates would else be the model that it began with.
    """

    decay: float
    every: int

    def keep(self, updates: Array) -> Array:
        """How much of the average stays after so many updates."""
        k = updates.astype(jnp.float32) - 1
        decay = jnp.minimum((1 + k) / (10 + k), self.decay)
        moves = (updates < self.every) | (updates % self.every == 0)
        return jnp.where(moves, decay, 1.0)


class Behaviour(NamedTuple):
    """The policy that samples, when it follows the learner at a distance.

    Every `every` updates it keeps `first` + `rate` * (updates - `start`) of itself, at
    most `most`, and takes the rest from the learner; all of it until `start`. All zero
    is a copy (ORW-CFM-W2, online DPO); the ramps are DiffusionNFT's and CRD's. With
    `samples` False the learner samples, and a loss that needs an "ema" gets this one in
    place of the evaluation's (AWM).
    """

    first: float
    rate: float
    start: int
    most: float
    every: int
    samples: bool = True

    def keep(self, updates: Array) -> Array:
        """How much of the behaviour policy stays after so many updates."""
        after = updates.astype(jnp.float32) - self.start
        ramp = jnp.minimum(self.first + self.rate * after, self.most)
        kept = jnp.where(after < 0, 0.0, ramp)
        return jnp.where(updates % self.every == 0, kept, 1.0)


class UpdateBatch(NamedTuple):
    """What to learn from: a microbatch per [update, batch], one entry per slot.

    An entry points to a state of the device's rollout, or to the samples that must be
    together. `number` and `draw` tell the noise of forward-process objectives apart.
    Padding has weight 0.
    """

    item: Column  # [update, batch, slot], of samples [update, batch, slot, sibling]
    prompt: Column  # [update, batch, slot]
    weight: Column  # [update, batch, slot, sibling]
    advantage: Column  # [update, batch, slot, sibling]
    reward: Column  # [update, batch, slot, sibling]
    number: Column  # [update, batch, slot, sibling]
    draw: Column  # [update, batch, slot]


def init_state(
    trainable: Any, optimizer: optax.GradientTransformation, behaviour: bool = False
) -> TrainState:
    """State before the first update; averages start at the parameters."""
    return TrainState(
        trainable=trainable,
        optimizer=optimizer.init(trainable),
        ema=jax.tree.map(jnp.copy, trainable),
        updates=jnp.zeros((), jnp.int32),
        behaviour=jax.tree.map(jnp.copy, trainable) if behaviour else None,
    )


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer by name (adamw or muon) and its numbers; counts are of updates.

    The rate rises over `warmup` updates, is constant, and falls to 0 over the last
    `decay` of `total`. A `max_grad_norm` of 0 is no clip.
    """

    name: str
    learning_rate: float
    weight_decay: float
    eps: float
    max_grad_norm: float
    warmup: int = 0
    decay: int = 0
    total: int = 0


def learning_rate(spec: OptimizerSpec) -> optax.Schedule:
    """Warm-up, constant, linear decay to zero."""
    rate, warmup, decay = spec.learning_rate, spec.warmup, spec.decay
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0 if warmup else rate, rate, max(warmup, 1)),
            optax.linear_schedule(rate, 0.0 if decay else rate, max(decay, 1)),
        ],
        [spec.total - decay],
    )


def make_optimizer(spec: OptimizerSpec) -> optax.GradientTransformation:
    """AdamW (Flow-GRPO) or Muon (pretraining) behind a clip of the global norm."""
    rate = learning_rate(spec)
    if spec.name == "muon":
        inner = optax.contrib.muon(
            rate,
            adam_b2=0.99,
            weight_decay=spec.weight_decay,
            muon_weight_dimension_numbers=_matrices,
        )
    else:
        inner = optax.adamw(rate, eps=spec.eps, weight_decay=spec.weight_decay)
    # Without a clip the state has the same form: a checkpoint suits either.
    most = spec.max_grad_norm
    clip = optax.clip_by_global_norm(most) if most else optax.identity()
    return optax.chain(clip, inner)


def _matrices(params: Any) -> Any:
    """Kernels are matrices in their last two dimensions; scanned layers stack them."""

    def numbers(path, leaf):
        if "kernel" not in jax.tree_util.keystr(path):
            return None
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(numbers, params)


def local_gradients(
    loss: Callable[..., tuple[Array, dict[str, Array]]],
    fetch: Callable[[UpdateBatch], Any],
    update_batch: UpdateBatch,
    trainable: Any,
    text_of: Callable[[Array], tuple],
    part: Callable[[Any], Any] = lambda gradients: gradients,
    agree: Callable[[Array], Array] = lambda busy: busy,
    summation: Summation = ROUNDED,
    so_far: tuple[Any, dict[str, Array]] | None = None,
) -> tuple[Any, dict[str, Array]]:
    """Sum over this device's entries of weight * gradient, and of measurements.

    `update_batch` are [batch, slot, ...]; `fetch` gives the elements of a microbatch of
    them; `loss(trainable, text, elements)` gives values and measurements [slot,
    sibling]. Measurements are added up as `measurements.added` says. Where devices
    share the parameters, `part` makes this device's part of a gradient, and `agree`
    tells which batches [batch] any of them works on. What comes back is not `whole` yet:
    the sums of all devices are added first. `so_far`: sums to go on from.
    """

    def one_loss(trainable, batch: UpdateBatch):
        values, info = loss(trainable, text_of(batch.prompt), fetch(batch))
        return jnp.sum(batch.weight * values), info

    gradient = jax.grad(one_loss, has_aux=True)

    def own(grads):
        return jax.tree.map(lambda g: g.astype(jnp.float32), part(grads))

    def one_batch(carry, batch_and_busy):
        batch, busy = batch_and_busy

        def work(carry):
            total, sums = carry
            grads, info = gradient(trainable, batch)
            total = summation.add(total, own(grads))
            return total, measurements.added(sums, info, batch.weight, summation)

        return jax.lax.cond(busy, work, lambda carry: carry, carry), None

    if so_far is None:
        first = jax.tree.map(lambda x: x[0], update_batch)
        _, info = jax.eval_shape(one_loss, trainable, first)
        kept = jax.eval_shape(own, trainable)
        so_far = (summation.start(kept), measurements.none_yet(info, summation))
    busy = agree(jnp.any(update_batch.weight != 0, axis=(1, 2)))
    return jax.lax.scan(one_batch, so_far, (update_batch, busy))[0]


def update(
    optimizer: optax.GradientTransformation,
    ema: Ema,
    behaviour: Behaviour | None,
    gradients: Gradients,
    state: TrainState,
    update_batch: UpdateBatch,
) -> tuple[TrainState, dict[str, Array]]:
    """All optimizer steps of an iteration.

    `gradients(state, entries of one update)` gives sums over the mesh. Measurements
    come back per update, averaged by weight; an update without any weight leaves the
    state as it is.
    """

    def one(state: TrainState, chunk: UpdateBatch):
        total = jnp.sum(chunk.weight)
        scale = 1.0 / jnp.maximum(total, 1.0)
        grads, sums = gradients(state, chunk)
        grads = jax.tree.map(lambda g: g * scale, grads)
        changes, inner = optimizer.update(grads, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, changes)
        count = state.updates + 1
        new = TrainState(
            trainable=trainable,
            optimizer=inner,
            ema=optax.incremental_update(trainable, state.ema, 1 - ema.keep(count)),
            updates=count,
            behaviour=behaviour
            and optax.incremental_update(
                trainable, state.behaviour, 1 - behaviour.keep(count)
            ),
        )
        new = jax.tree.map(lambda a, b: jnp.where(total > 0, a, b), new, state)
        info = measurements.averaged(sums, scale)
        return new, info | {"grad_norm": optax.tree.norm(grads)}

    return jax.lax.scan(one, state, update_batch)
