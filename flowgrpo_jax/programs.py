"""The three compiled programs of an iteration: rollout, decode, update.

Each runs under the mesh by shard_map: a device sees its own microbatches and whole
parameters. Weights, embeddings and tables come in as arguments, never as constants.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flowgrpo_jax.flow import rollout
from flowgrpo_jax.models.flow_model import overlay
from flowgrpo_jax.rl import losses
from flowgrpo_jax.rl import update as rl_update
from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.sprites import world

WHOLE = PartitionSpec()
# [update, batch, ...]: the microbatches of a chunk are split over all devices.
SPLIT = PartitionSpec(None, meshes.AXES)

# Kernels are sharded along their input or output features (`fsdp`), the rest is small.
SHARDING_RULES: meshes.Rules = (
    (
        r"(qkv|proj|context_embedder|norm1|norm1_context|norm_out)/kernel",
        (None, "fsdp"),
    ),
    (r"(out|to_out|to_add_out|proj_out)/kernel", ("fsdp", None)),
)


def text_lookup(table: Any, empty: Any) -> Callable[[jax.Array], tuple]:
    """Text arguments of a guided velocity for prompt numbers: rows of the table."""
    return lambda prompt: (jax.tree.map(lambda rows: rows[prompt], table), empty)


def make_rollout(
    mesh: Mesh,
    variable_specs: Any,
    sampler: rollout.Sampler,
    latent_shape: tuple[int, int, int],
) -> Callable:
    """(variables, key, layout, tables, text table, empty text) -> (transitions, clean).

    Results lead with [update, batch]; `text table` has one row per prompt.
    """

    def local(variables, key, layout, tables, text, empty):
        return rollout.rollout(
            sampler,
            meshes.gather(variables, variable_specs),
            key,
            layout,
            tables,
            text_lookup(text, empty),
            latent_shape,
        )

    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(variable_specs, WHOLE, SPLIT, WHOLE, WHOLE, WHOLE),
            out_specs=SPLIT,
            check_vma=False,
        )
    )


def make_decode(mesh: Mesh, decode: Callable[[jax.Array], jax.Array]) -> Callable:
    """Clean latents [update, batch, slot, sibling, ...] to images in [0, 1]."""

    def local(clean):
        lead, slots = clean.shape[:4], clean.shape[2]
        # Microbatches of as many images as the network takes at once.
        images = jax.lax.map(decode, clean.reshape(-1, slots, *clean.shape[4:]))
        return images.reshape(*lead, *images.shape[2:])

    return jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=SPLIT, out_specs=SPLIT, check_vma=False
        )
    )


def make_update(
    mesh: Mesh,
    state_specs: rl_update.TrainState,
    frozen_specs: Any,
    loss: losses.Loss,
    optimizer: optax.GradientTransformation,
    ema: rl_update.Ema,
) -> Callable:
    """(state, frozen, elements, weights, prompts, text table, empty) -> (state, info).

    elements [update, batch, trained, slot, ...]; prompts [update, batch, slot],
    weights [update, batch, slot, sibling]. The policy is `frozen` overlaid with the trainable variables, the reference
    is `frozen` alone. The state is donated.
    """

    trainable_specs = state_specs.trainable

    def local(trainable, frozen, elements, weight, prompt, text, empty):
        frozen = meshes.gather(frozen, frozen_specs)
        grads, sums = rl_update.local_gradients(
            loss,
            lambda part: overlay(frozen, part),
            meshes.gather(trainable, trainable_specs),
            frozen,
            elements,
            weight,
            text_lookup(text, empty),
            prompt,
        )
        whole = {
            name: (jax.lax.pmax if name.endswith("_gap") else jax.lax.psum)(
                value, meshes.AXES
            )
            for name, value in sums.items()
        }
        return meshes.reduce_gradients(grads, trainable_specs), whole

    batches = PartitionSpec(meshes.AXES)
    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            trainable_specs,
            frozen_specs,
            batches,
            batches,
            batches,
            WHOLE,
            WHOLE,
        ),
        out_specs=(trainable_specs, WHOLE),
        check_vma=False,
    )

    def program(state, frozen, elements, weights, prompts, text, empty):
        def gradients(trainable, chunk, weight):
            chunk_elements, chunk_prompts = chunk
            return sharded(
                trainable, frozen, chunk_elements, weight, chunk_prompts, text, empty
            )

        return rl_update.update(
            optimizer, ema, gradients, state, (elements, prompts), weights
        )

    # Said, not left to the compiler: the state goes in as it came out.
    out = (meshes.shardings(state_specs, mesh), NamedSharding(mesh, WHOLE))
    return jax.jit(program, donate_argnums=0, out_shardings=out)


def transition_elements(
    transitions: rollout.Transitions, advantage: jax.Array
) -> losses.TransitionElements:
    """Give every trained step its samples' advantage [update, batch, slot, sibling]."""
    shape = transitions.log_prob.shape
    return losses.TransitionElements(
        transitions=transitions,
        advantage=jnp.broadcast_to(advantage[:, :, None], shape),
    )


def make_scene_encoder(
    mesh: Mesh, encode: Callable[[jax.Array], jax.Array]
) -> Callable:
    """(scenes, key, layout) -> elements of the flow-matching objective.

    Scenes are painted where they are used; each has its own key for sigma and noise.
    """

    def local(scenes, key, layout):
        def one_batch(batch):
            prompt, member = batch
            painted = world.render(jax.tree.map(lambda rows: rows[prompt], scenes))
            return encode(painted), rollout.sample_keys(key, prompt, member)

        updates, batches = layout.prompt.shape[:2]
        only = layout.member[..., 0]  # nothing is shared here: one sibling per slot
        flat = tuple(x.reshape(updates * batches, -1) for x in (layout.prompt, only))
        clean, keys = jax.lax.map(one_batch, flat)
        # One "trained step" per sample, as the update counts them.
        lead = (updates, batches, 1)
        return losses.SampleElements(
            clean=clean.reshape(*lead, *clean.shape[1:]),
            noise_key=keys.reshape(*lead, *keys.shape[1:]),
        )

    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(WHOLE, WHOLE, SPLIT),
            out_specs=SPLIT,
            check_vma=False,
        )
    )
