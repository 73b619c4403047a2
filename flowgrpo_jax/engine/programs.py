"""The three compiled programs of an iteration: rollout, decode, update.

Each runs under the mesh by shard_map: a device sees its own microbatches, and its part
of the parameters, which layers make whole. Weights, embeddings and tables come in as
arguments, never as constants.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from flowgrpo_jax.flow import rollout
from flowgrpo_jax.models.flow_model import overlay
from flowgrpo_jax.rl import losses
from flowgrpo_jax.rl import update as rl_update
from flowgrpo_jax.rl.measurements import LARGEST
from flowgrpo_jax.rl.objectives.noised import SampleElements
from flowgrpo_jax.rl.summation import EXACT, ROUNDED
from flowgrpo_jax.rl.update import UpdateBatch
from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.runtime import platform

WHOLE = PartitionSpec()
# [pack, ...]: packs are split over all devices.
PACKS = PartitionSpec(meshes.AXES)
# [update, batch, ...]: so are the microbatches of an update.
SPLIT = PartitionSpec(None, meshes.AXES)


def text_lookup(table: Any, empty: Any) -> Callable[[jax.Array], tuple]:
    """Text arguments of a guided velocity for prompt numbers: rows of the table."""
    return lambda prompt: (jax.tree.map(lambda rows: rows[prompt], table), empty)


def _parameters(variables: Any, specs: Any, dtype: DTypeLike | None) -> Any:
    """What the model reads: the transformer in shards, as its layers take it."""
    return {
        name: (meshes.in_shards if name == "transformer" else meshes.gather)(
            tree, specs[name], dtype
        )
        for name, tree in variables.items()
    }


def _any_of_fsdp(value: Any) -> Any:
    """The largest of the devices that share the parameters.

    They make them whole together, so all of them run the network as often as any does.
    """
    return jax.lax.pmax(value, "fsdp")


def make_rollout(
    mesh: meshes.AnyMesh,
    variable_specs: Any,
    sampler: rollout.Sampler,
    latent_shape: tuple[int, int, int],
    dtype: DTypeLike | None = None,
) -> Callable:
    """(variables, key, tables, text table, empty text) -> Rollout.

    Tables and results lead with [pack]; `text table` has one row per prompt. `dtype`:
    the layers'; whole copies of sharded parameters are of this type.
    """

    def local(variables, key, tables, text, empty):
        return rollout.rollout(
            sampler,
            _parameters(variables, variable_specs, dtype),
            key,
            tables,
            text_lookup(text, empty),
            latent_shape,
            agree=_any_of_fsdp,
        )

    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(variable_specs, WHOLE, PACKS, WHOLE, WHOLE),
            out_specs=PACKS,
            check_vma=False,
        ),
        compiler_options=platform.one_library(mesh, dtype),
    )


def make_join(mesh: meshes.AnyMesh) -> Callable:
    """(part, ...) -> one tree, where each has as many packs of every device."""

    def local(*parts):
        return jax.tree.map(lambda *rows: jnp.concatenate(rows), *parts)

    return jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=PACKS, out_specs=PACKS, check_vma=False
        )
    )


def make_decode(
    mesh: meshes.AnyMesh,
    variable_specs: Any,
    decode: Callable[[Any, jax.Array], jax.Array],
    microbatch: int,
) -> Callable:
    """(variables, clean latents [pack, leaf, ...]) -> images in [0, 1].

    Of the variables only what decodes; so many latents at once.
    """

    def local(variables, clean):
        one_batch = functools.partial(decode, meshes.gather(variables, variable_specs))
        lead, shape = clean.shape[:2], clean.shape[2:]
        count = lead[0] * lead[1]
        flat = jnp.pad(
            clean.reshape(count, *shape), ((0, -count % microbatch), *((0, 0),) * 3)
        )
        images = jax.lax.map(one_batch, flat.reshape(-1, microbatch, *shape))
        return images.reshape(-1, *images.shape[2:])[:count].reshape(
            *lead, *images.shape[2:]
        )

    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(variable_specs, PACKS),
            out_specs=PACKS,
            check_vma=False,
        )
    )


def fetch_transitions(
    transitions: rollout.Transitions, key: jax.Array
) -> Callable[[UpdateBatch], losses.TransitionElements]:
    """The elements of a microbatch of entries, from this device's [pack, state, ...]."""
    del key
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), transitions)

    def fetch(batch: UpdateBatch) -> losses.TransitionElements:
        stored = jax.tree.map(lambda rows: rows[batch.item], flat)
        return losses.TransitionElements(stored, batch.advantage)

    return fetch


def fetch_samples(
    clean: jax.Array, key: jax.Array
) -> Callable[[UpdateBatch], SampleElements]:
    """The same from clean latents [pack, leaf, ...]; every draw has its own key."""
    flat = clean.reshape(-1, *clean.shape[2:])

    def fetch(batch: UpdateBatch) -> SampleElements:
        slots, siblings = batch.item.shape

        def per_sample(values):
            return jnp.repeat(values, siblings)

        of_samples = rollout.sample_keys(
            key, per_sample(batch.prompt), batch.number.reshape(-1)
        )
        draw = per_sample(batch.draw)
        keys = jax.vmap(jax.random.fold_in)(of_samples, draw)
        return SampleElements(
            clean=flat[batch.item],
            advantage=batch.advantage,
            reward=batch.reward,
            noise_key=keys.reshape(slots, siblings),
            sample_key=of_samples.reshape(slots, siblings),
            draw=draw.reshape(slots, siblings),
        )

    return fetch


def make_update(
    mesh: meshes.AnyMesh,
    state_specs: rl_update.TrainState,
    frozen_specs: Any,
    loss: losses.Loss,
    needs: frozenset[str],
    fetch_from: Callable[[Any, jax.Array], Callable[[UpdateBatch], Any]],
    optimizer: optax.GradientTransformation,
    ema: rl_update.Ema,
    behaviour: rl_update.Behaviour | None = None,
    dtype: DTypeLike | None = None,
    exact: bool = False,
) -> Callable:
    """A program that learns: it gives the new state and measurements of every update.

    It takes (state, frozen, experience, update batch, key, text table, empty text).
    `experience` [pack, ...] is what the batch's entries point into and `fetch_from`
    reads. The policy is `frozen` overlaid with the trainable variables; of the fixed
    policies those that the loss `needs` are made: "frozen" itself, "old" (the behaviour
    policy, or the learner as it was when the iteration began) and "ema", an average.
    The state is donated. `dtype` as for the rollout; gradients are summed and reduced
    in fp32. If `exact`, they are the same bits on any mesh: every pack is one round of a
    loop, of one shape, and `rl/summation.py` adds up; no axis may split what learns.
    """
    trainable_specs = state_specs.trainable
    summation = EXACT if exact else ROUNDED

    def local(
        trainable, old, average, frozen, experience, update_batch, key, text, empty
    ):
        frozen = _parameters(frozen, frozen_specs, dtype)

        def variables(part):
            return overlay(frozen, _parameters(part, trainable_specs, dtype))

        policies = losses.Policies(
            frozen=frozen if "frozen" in needs else None,
            old=variables(old) if "old" in needs else None,
            ema=variables(average) if "ema" in needs else None,
        )
        learning = _parameters(trainable, trainable_specs, dtype)

        def gradients(so_far, experience, update_batch):
            return rl_update.local_gradients(
                lambda part, texts, elements: loss(
                    overlay(frozen, part), policies, texts, elements
                ),
                fetch_from(experience, key),
                update_batch,
                learning,
                text_lookup(text, empty),
                part=meshes.parts,
                agree=lambda busy: _any_of_fsdp(busy.astype(jnp.int32)) > 0,
                summation=summation,
                so_far=so_far,
            )

        if exact:
            grads, sums = _pack_by_pack(gradients, experience, update_batch)
        else:
            grads, sums = gradients(None, experience, update_batch)
        largest = {name: sums.pop(name) for name in LARGEST & sums.keys()}
        added = meshes.sum_over(sums, meshes.AXES)
        grads = meshes.sum_gradients(grads, trainable_specs)
        measured = summation.whole(added) | jax.lax.pmax(largest, meshes.AXES)
        return summation.whole(grads), measured

    fixed = (trainable_specs, trainable_specs, trainable_specs, frozen_specs)
    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(*fixed, PACKS, PartitionSpec(meshes.AXES), WHOLE, WHOLE, WHOLE),
        out_specs=(trainable_specs, WHOLE),
        check_vma=False,
    )

    def program(state, frozen, experience, update_batch, key, text, empty):
        # What `behaviour` keeps is who sampled, or else the average to compare with.
        samples = behaviour is not None and behaviour.samples
        began_with = state.behaviour if samples else state.trainable

        def gradients(state, chunk):
            return sharded(
                state.trainable,
                began_with,
                state.ema if samples or behaviour is None else state.behaviour,
                frozen,
                experience,
                chunk,
                key,
                text,
                empty,
            )

        return rl_update.update(
            optimizer, ema, behaviour, gradients, state, update_batch
        )

    # Said, not left to the compiler: the state goes in as it came out.
    out = (meshes.shardings(state_specs, mesh), NamedSharding(mesh, WHOLE))
    return jax.jit(
        program,
        donate_argnums=0,
        out_shardings=out,
        compiler_options=platform.one_library(mesh, dtype),
    )


def _pack_by_pack(gradients: Callable, experience: Any, update_batch: Any) -> Any:
    """Sums over a device's packs, each of which has equally many batches."""
    packs = len(jax.tree.leaves(experience)[0])
    batches = jax.tree.map(lambda x: x.reshape(packs, -1, *x.shape[1:]), update_batch)
    alone = jax.tree.map(lambda x: x[:, None], experience)

    def one_pack(so_far, pack):
        return gradients(so_far, *pack), None

    first = jax.tree.map(lambda x: x[0], (alone, batches))
    shapes = jax.eval_shape(lambda pack: gradients(None, *pack), first)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(one_pack, nothing, (alone, batches))[0]


def make_scene_encoder(
    mesh: meshes.AnyMesh, encode: Callable[[Any], jax.Array]
) -> Callable:
    """(scenes, numbers [pack, leaf]) -> clean latents [pack, leaf, ...].

    Scenes are painted where they are used; `encode` makes latents of some of them.
    """

    def local(scenes, numbers):
        def one_batch(numbers):
            return encode(jax.tree.map(lambda x: x[numbers], scenes))

        return jax.lax.map(one_batch, numbers)

    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(WHOLE, PACKS),
            out_specs=PACKS,
            check_vma=False,
        )
    )
