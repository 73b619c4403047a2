"""Learning: stored elements to new parameters, all chunks in one compiled program.

For every chunk (one optimizer step): each device loops over its microbatches and over
the trained steps of each, adds up gradients in fp32, the mesh sums them, optax makes
the step, the EMA follows. A microbatch whose weights are all zero (no advantage, or
padding) is skipped, not multiplied by zero.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array

from flowgrpo_jax.rl.losses import Loss

Gradients = Callable[..., tuple[Any, dict[str, Array]]]


@struct.dataclass
class TrainState:
    """Everything that the optimizer changes: parameters, their EMA and its own state.

    `updates` counts optimizer steps. Fields are untyped since shardings, shapes and
    checkpoint arguments take the place of the arrays in trees of this form.
    """

    trainable: Any
    optimizer: Any
    ema: Any
    updates: Any


class Ema(NamedTuple):
    """Flow-GRPO's EMA: every `every` updates by min((1 + k) / (10 + k), decay)."""

    decay: float
    every: int


def init_state(trainable: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first update; the EMA starts at the parameters."""
    return TrainState(
        trainable=trainable,
        optimizer=optimizer.init(trainable),
        ema=jax.tree.map(jnp.copy, trainable),
        updates=jnp.zeros((), jnp.int32),
    )


def make_optimizer(
    learning_rate: float | optax.Schedule,
    *,
    max_grad_norm: float,
    weight_decay: float,
    eps: float,
    name: str = "adamw",
) -> optax.GradientTransformation:
    """AdamW (Flow-GRPO) or Muon (pretraining) behind a clip of the global norm."""
    if name == "muon":
        inner = optax.contrib.muon(
            learning_rate,
            adam_b2=0.99,
            weight_decay=weight_decay,
            muon_weight_dimension_numbers=_matrices,
        )
    else:
        inner = optax.adamw(learning_rate, eps=eps, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), inner)


def _matrices(params: Any) -> Any:
    """Kernels are matrices in their last two dimensions; scanned layers stack them."""

    def numbers(path, leaf):
        if "kernel" not in jax.tree_util.keystr(path):
            return None
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(numbers, params)


def local_gradients(
    loss: Loss,
    merge: Callable[[Any], Any],
    trainable: Any,
    reference: Any,
    elements: Any,
    weight: Array,
    text_of: Callable[[Array], tuple],
    prompt: Array,
) -> tuple[Any, dict[str, Array]]:
    """Sum over this device's elements of weight * gradient, and of measurements.

    elements [batch, trained, slot, ...]; weight [batch, slot, sibling], as the losses;
    prompt [batch, slot]. `merge`
    turns trainable parameters into the policy's variables. Measurements are weighted
    sums; those named `*_gap` are maxima.
    """

    def one_loss(trainable, element, batch_weight, text):
        values, info = loss(merge(trainable), reference, text, element)
        return jnp.sum(batch_weight * values), info

    gradient = jax.grad(one_loss, has_aux=True)

    def step(carry, element, batch_weight, text):
        total, sums = carry
        grads, info = gradient(trainable, element, batch_weight, text)
        total = jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grads)
        return total, _add_measurements(sums, info, batch_weight)

    def one_batch(carry, batch):
        element, batch_weight, batch_prompt = batch

        def work(carry):
            text = text_of(batch_prompt)
            return jax.lax.scan(
                lambda c, e: (step(c, e, batch_weight, text), None), carry, element
            )[0]

        skip = jnp.all(batch_weight == 0)
        return jax.lax.cond(skip, lambda carry: carry, work, carry), None

    first = jax.tree.map(lambda x: x[0, 0], elements)
    _, info = jax.eval_shape(
        lambda p: one_loss(trainable, first, weight[0], text_of(p)), prompt[0]
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable)
    start = (zeros, {name: jnp.zeros(()) for name in info})
    return jax.lax.scan(one_batch, start, (elements, weight, prompt))[0]


def _add_measurements(sums, info, weight) -> dict[str, Array]:
    def add(name, value):
        value = value.astype(jnp.float32)
        if name.endswith("_gap"):
            return jnp.maximum(sums[name], jnp.max(jnp.where(weight > 0, value, 0.0)))
        return sums[name] + jnp.sum(weight * value)

    return {name: add(name, value) for name, value in info.items()}


def update(
    optimizer: optax.GradientTransformation,
    ema: Ema,
    gradients: Gradients,
    state: TrainState,
    chunks: Any,
    weights: Array,
) -> tuple[TrainState, dict[str, Array]]:
    """All optimizer steps of an iteration.

    chunks is (elements [update, batch, trained, slot, ...], prompts [update, batch,
    slot]), weights [update, batch, slot, sibling]. `gradients(trainable, chunk,
    weight)` gives sums over the mesh. Measurements come back per update, averaged by
    weight; a chunk without any weight leaves the state as it is.
    """

    def one(state: TrainState, inputs):
        chunk, weight = inputs
        trained = jax.tree.leaves(chunk)[0].shape[1]
        total = jnp.sum(weight) * trained
        scale = 1.0 / jnp.maximum(total, 1.0)
        grads, sums = gradients(state.trainable, chunk, weight)
        grads = jax.tree.map(lambda g: g * scale, grads)
        changes, inner = optimizer.update(grads, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, changes)
        count = state.updates + 1
        k = count.astype(jnp.float32) - 1
        decay = jnp.minimum((1 + k) / (10 + k), ema.decay)
        keep = jnp.where(count % ema.every == 0, decay, 1.0)
        new = TrainState(
            trainable=trainable,
            optimizer=inner,
            ema=optax.incremental_update(trainable, state.ema, 1 - keep),
            updates=count,
        )
        new = jax.tree.map(lambda a, b: jnp.where(total > 0, a, b), new, state)
        info = {
            name: value if name.endswith("_gap") else value * scale
            for name, value in sums.items()
        }
        return new, info | {"grad_norm": optax.tree.norm(grads)}

    return jax.lax.scan(one, state, (chunks, weights))
