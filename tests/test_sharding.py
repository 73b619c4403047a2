"""One iteration of a small SD3.5-like network on every shape of eight devices."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax.engine import programs
from flowgrpo_jax.flow import packing
from flowgrpo_jax.models.flow_model import overlay
from flowgrpo_jax.models.sd3.denoiser import SD3Denoiser
from flowgrpo_jax.models.sd3.sharding import SHARDING_RULES
from flowgrpo_jax.models.text import TextEmbedding
from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.worlds.sprites import model as sprites_model

PROMPTS, TOKENS, WIDTH = 8, 5, 32
# The one that splits both ways comes first and always.
MESHES = [
    (2, 4),
    pytest.param(1, 8, marks=pytest.mark.more),
    pytest.param(8, 1, marks=pytest.mark.more),
]


def small_model(depth: int = 3):
    """(model, variables): a dual block, plain ones, and the last; nothing is zero."""
    size = sprites_model.Size(width=WIDTH, depth=depth, heads=2, patch=8)
    model = sprites_model.make_model(size)
    config = dataclasses.replace(model.denoiser.config, dual_attention_layers=(0,))
    network = SD3Denoiser(config)
    model = dataclasses.replace(model, denoiser=network, predicts="velocity")
    variables = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    return model, jax.tree.map(
        lambda x: np.asarray(x + 0.05 * rng.standard_normal(x.shape), np.float32),
        variables,
    )


def sampled(
    data: int, fsdp: int, prompts: int = PROMPTS, depth: int = 3, exact: bool = False
):
    """(work, what an update takes, images in the order of prompts) of one rollout."""
    config = configs.make(
        prompts_per_iteration=prompts,
        group_size=2,
        updates_per_iteration=1,
        microbatch=2,
        sample__num_steps=3,
        train__use_lora=False,
        train__max_grad_norm=1e9,
        mesh__exact=exact,
    )
    devices = jax.devices()[: data * fsdp]
    mesh = meshes.make_mesh({"data": data, "fsdp": fsdp}, devices)
    model, variables = small_model(depth)
    work = assemble.make_work(config, mesh, model, variables)
    rng = np.random.default_rng(1)

    def text(rows):
        context = rng.standard_normal((rows, TOKENS, WIDTH)).astype(np.float32)
        pooled = rng.standard_normal((rows, WIDTH)).astype(np.float32)
        return meshes.place(TextEmbedding(context, pooled), programs.WHOLE, mesh)

    trainable = jax.device_get(assemble.trainable_part(config, model, variables))
    state = work.initial_state(meshes.place(trainable, work.trainable_specs, mesh))
    frozen = meshes.place(
        work.frozen_part(variables, trainable), work.frozen_specs, mesh
    )
    _, packed, update_batch = work.first_iteration()
    table, empty, key = text(prompts), text(1), meshes.random_key(mesh, 0)
    tables = meshes.place(packed.tables, programs.PACKS, mesh)
    policy = overlay(frozen, work.sampling_part(state))
    made = work.rollout(policy, key, tables, table, empty)
    images = packing.collect(np.asarray(made.clean), packed)
    placed = meshes.place(update_batch, programs.SPLIT, mesh)
    taken = (state, frozen, work.experience(made), placed, key, table, empty)
    return work, taken, images


@functools.cache
def iteration(data: int, fsdp: int, exact: bool = False):
    """(images in the order of prompts, measurements, gradients, state) of one update."""
    work, taken, images = sampled(data, fsdp, exact=exact)
    state, info = work.update(*taken)
    # After one step from zero Adam's first moment is a tenth of the gradient.
    grads = optax.tree.get(state.optimizer, "mu")
    return images, *jax.device_get((info, grads)), (state, work.state_specs, work.mesh)


@pytest.mark.parametrize("data, fsdp", MESHES)
def test_images(data, fsdp):
    """Oracle: an invariance; bitwise those of one device."""
    np.testing.assert_array_equal(iteration(data, fsdp)[0], iteration(1, 1)[0])


def test_devices_with_less_to_do_run_along():
    """Oracle: an invariance; three prompts on two devices, which make weights whole.

    Two plain blocks: of a stack of one, XLA makes weights whole before all rounds.
    """
    uneven = {"prompts": 3, "depth": 4}
    work, _, images = sampled(1, 2, **uneven)
    rounds = np.asarray(work.first_iteration()[1].tables.rounds).reshape(2, -1)
    assert len(set(rounds.sum(axis=1))) == 2
    np.testing.assert_array_equal(images, sampled(1, 1, **uneven)[2])


@pytest.mark.parametrize("data, fsdp", MESHES)
def test_loss_and_gradients(data, fsdp):
    """Oracle: an invariance; the order of sums is all that differs.

    Relative to the largest gradient of a parameter; to the sum of |values| of a mean
    of both signs.
    """
    info, grads = iteration(data, fsdp)[1:3]
    info_alone, grads_alone = iteration(1, 1)[1:3]
    for name in ("policy_loss", "kl_loss", "grad_norm"):
        scale = max(1.0, abs(float(info_alone[name][0])))
        assert abs(info[name] - info_alone[name])[0] <= 1e-6 * scale, name

    def close(path, mine, alone):
        error, most = np.abs(mine - alone).max(), np.abs(alone).max()
        assert error <= 1e-6 * most, (jax.tree_util.keystr(path), error, most)

    jax.tree_util.tree_map_with_path(close, grads, grads_alone)


@pytest.mark.parametrize("data, fsdp", MESHES)
def test_exact_gradients(data, fsdp):
    """Oracle: an invariance; `mesh.exact` makes them and all measurements equal.

    To two devices, not one: of one XLA makes another program for CPUs (jax 0.10).
    """
    mine, alone = (
        (
            *iteration(*shape, exact=True)[1:3],
            iteration(*shape, exact=True)[3][0].trainable,
        )
        for shape in ((data, fsdp), (1, 2))
    )
    jax.tree.map(np.testing.assert_array_equal, mine, jax.device_get(alone))


def test_exact_gradients_are_the_others():
    """Oracle: the same sums in fp32; to 1e-5 of a parameter's largest gradient."""
    exact, rounded = iteration(1, 2, exact=True)[2], iteration(1, 1)[2]
    pairs = zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True)
    for mine, other in pairs:
        assert np.abs(mine - other).max() <= 1e-5 * np.abs(other).max()


def test_the_state_keeps_its_sharding():
    """Oracle: an invariance; a second update finds the shardings of the first."""
    state, specs, mesh = iteration(2, 4)[3]
    wanted = meshes.shardings(specs, mesh)
    kept = jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, wanted
    )
    assert all(jax.tree.leaves(kept))
    moment = jax.tree.leaves(state.optimizer)
    assert any(not leaf.is_fully_replicated for leaf in moment)


def test_large_matrices_are_in_shards():
    """Oracle: by hand; all but norms, biases and the small embeddings are split."""
    model, variables = small_model()
    mesh = meshes.make_mesh({"data": 1, "fsdp": 8})
    specs = meshes.specs(variables["transformer"], SHARDING_RULES, mesh)
    sharded = jax.tree.map(lambda s: "fsdp" in s, specs, is_leaf=lambda s: s is None)
    flat = jax.tree_util.tree_leaves_with_path(sharded)
    whole = {jax.tree_util.keystr(path) for path, split in flat if not split}
    assert not {path for path in whole if "qkv" in path and "kernel" in path}
