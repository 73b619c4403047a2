"""Rollout and update as compiled programs: on-policy, and the same on any mesh."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax import programs
from flowgrpo_jax.flow import layout as layouts
from flowgrpo_jax.flow import plan, rollout, schedule
from flowgrpo_jax.models.flow_model import guided
from flowgrpo_jax.rl import losses
from flowgrpo_jax.rl import update as rl_update
from flowgrpo_jax.runtime import mesh as meshes
from tests.tiny import tiny_model

PROMPTS, UPDATES, STEPS = 4, 2, 4
DTYPES = (jnp.float32, jnp.bfloat16)
TEXTS = ["a photo of a red circle", "two squares", "a cross above a ring", "circle"]


class Setup:
    """A rollout and an update of the tiny model on a mesh."""

    def __init__(
        self,
        mesh,
        lora,
        guidance,
        dtype=jnp.float32,
        group_size=3,
        microbatch=2,
        branch=False,
        share=True,
    ):
        self.mesh, self.group_size = mesh, group_size
        self.model, variables = tiny_model(4 if lora else 0, dtype)
        names = ("lora",) if lora else ("transformer",)
        trainable = {name: variables[name] for name in names}
        frozen = {k: v for k, v in variables.items() if k not in names or not lora}
        self.specs = [
            meshes.specs(tree, programs.SHARDING_RULES, mesh)
            for tree in (trainable, frozen)
        ]
        self.trainable = meshes.place(trainable, self.specs[0], mesh)
        self.frozen = meshes.place(frozen, self.specs[1], mesh)
        sampler = rollout.Sampler(
            velocity=guided(self.model.velocity, guidance),
            sigmas=tuple(float(s) for s in schedule.sd3(STEPS)),
            kind="sde",
            noise_level=0.7,
            shared_noise=branch,
        )
        self.rollout = programs.make_rollout(
            mesh, self.specs[1] | self.specs[0], sampler, self.model.latent_shape
        )
        self.optimizer = rl_update.make_optimizer(
            1e-3, max_grad_norm=1.0, weight_decay=0.0, eps=1e-10
        )
        shapes = jax.eval_shape(
            lambda part: rl_update.init_state(part, self.optimizer), trainable
        )
        self.state_specs = meshes.specs(shapes, programs.SHARDING_RULES, mesh)
        self.update = programs.make_update(
            mesh,
            self.state_specs,
            self.specs[1],
            losses.clipped_policy_loss(
                sampler,
                clip_range=1e-4,
                adv_clip_max=5.0,
                beta=0.04,
                kl_form="official",
            ),
            self.optimizer,
            rl_update.Ema(0.9, 8),
        )
        self.layout = layouts.group_layout(
            PROMPTS,
            group_size,
            UPDATES,
            microbatch,
            mesh.size,
            siblings=group_size if branch and share else 1,
        )
        plans = [plan.all_steps(STEPS)] * PROMPTS
        if branch:
            plans = [plan.branch(STEPS, k % 3) for k in range(PROMPTS)]
        self.tables = plan.stack(plans)

    def place(self, tree, spec=programs.WHOLE):
        return meshes.place(tree, spec, self.mesh)

    def run(self):
        """(transitions, clean latents, updated state, measurements)."""
        ids = self.model.tokenizer([*TEXTS, ""])
        table = jax.jit(self.model.encode_text)({"text": self.frozen["text"]}, ids)
        table = jax.device_get(table)
        text = self.place(jax.tree.map(lambda rows: rows[:PROMPTS], table))
        empty = self.place(jax.tree.map(lambda rows: rows[PROMPTS:], table))
        layout = self.place(self.layout, programs.SPLIT)
        transitions, clean = self.rollout(
            self.frozen | self.trainable,
            meshes.random_key(self.mesh, 0),
            layout,
            self.place(self.tables),
            text,
            empty,
        )
        advantage = np.linspace(-1, 1, PROMPTS * self.group_size, dtype=np.float32)
        advantage[: self.group_size] = 0  # a group that teaches nothing
        spread = self.place(layouts.distribute(advantage, self.layout), programs.SPLIT)
        weights = self.place(
            layouts.distribute((advantage != 0).astype(np.float32), self.layout),
            programs.SPLIT,
        )
        state = jax.jit(
            lambda part: rl_update.init_state(part, self.optimizer),
            out_shardings=meshes.shardings(self.state_specs, self.mesh),
        )(jax.tree.map(jnp.copy, self.trainable))
        elements = jax.jit(programs.transition_elements)(transitions, spread)
        state, info = self.update(
            state, self.frozen, elements, weights, layout.prompt, text, empty
        )
        return transitions, clean, state, info


def mesh_of(data: int, fsdp: int = 1) -> jax.sharding.Mesh:
    devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    kinds = (jax.sharding.AxisType.Auto,) * 2
    return jax.sharding.Mesh(devices, meshes.AXES, axis_types=kinds)


@functools.cache
def on_mesh(data: int, fsdp: int = 1, branch: bool = False):
    """Host copies of one iteration's results, in the order of samples."""
    setup = Setup(mesh_of(data, fsdp), lora=False, guidance=2.5, branch=branch)
    transitions, clean, state, _ = setup.run()

    def by_sample(values):  # [update, batch, trained, slot, ...] to samples
        return layouts.collect(np.moveaxis(values, 3, 2), setup.layout)

    leaves = jax.device_get(jax.tree.leaves(transitions))
    transitions = [by_sample(leaf) for leaf in leaves]
    images = layouts.collect(jax.device_get(clean), setup.layout)
    return transitions, images, jax.device_get(state.trainable)


@pytest.mark.parametrize(
    "dtype, lora, guidance, branch",
    [
        *itertools.product(DTYPES, [False, True], [1.0, 2.5], [False]),
        (jnp.float32, False, 2.5, True),
        (jnp.float32, True, 1.0, True),
        (jnp.bfloat16, False, 1.0, True),
    ],
)
def test_first_update_is_on_policy(dtype, lora, guidance, branch):
    """Oracle: an invariance; the same weights give the same log-prob, bit for bit.

    Microbatches of 8: below, XLA's own reductions happened to agree.
    """
    setup = Setup(mesh_of(1), lora, guidance, dtype, 8, 8, branch)
    info = setup.run()[3]
    assert float(info["ratio_gap"][0]) == 0.0
    # The second update is not: the first one moved the policy.
    assert float(info["ratio_gap"][1]) > 0.0


@pytest.mark.parametrize(
    "data, fsdp, branch",
    [
        *((*sizes, False) for sizes in [(2, 1), (4, 1), (8, 1), (2, 2)]),
        (2, 1, True),
        (8, 1, True),
    ],
)
def test_any_mesh_gives_the_same_samples(data, fsdp, branch):
    """Oracle: an invariance; images and log-probs are bitwise equal to one device's."""
    transitions, images, _ = on_mesh(1, branch=branch)
    others, other_images, _ = on_mesh(data, fsdp, branch)
    np.testing.assert_array_equal(images, other_images)
    jax.tree.map(np.testing.assert_array_equal, transitions, others)


def test_siblings_that_share_a_state_are_what_they_are_alone():
    """Oracle: the rollout of one sample at a time, which computes all of its steps.

    The same keys, plans and noise; batches of another shape round differently.
    """
    alone, shared = (
        Setup(mesh_of(1), False, 2.5, branch=True, share=share)
        for share in (False, True)
    )
    (one, clean, state, _), (many, together, learned, _) = alone.run(), shared.run()
    np.testing.assert_allclose(
        layouts.collect(jax.device_get(together), shared.layout),
        layouts.collect(jax.device_get(clean), alone.layout),
        atol=1e-5,
    )

    def by_sample(transitions, setup, name):
        values = np.moveaxis(jax.device_get(getattr(transitions, name)), 2, 4)
        return layouts.collect(values, setup.layout)

    for name in ("log_prob", "next_latent"):
        np.testing.assert_allclose(
            by_sample(many, shared, name), by_sample(one, alone, name), atol=1e-5
        )
    # One backward pass for all siblings is the sum of theirs; Adam's first steps have
    # the size of the rate (1e-3) whatever the gradient, hence the tolerance.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        jax.device_get(learned.trainable),
        jax.device_get(state.trainable),
    )


def test_the_state_keeps_its_sharding():
    """Oracle: an invariance; a second update finds the shardings of the first."""
    setup = Setup(mesh_of(2, 2), lora=False, guidance=1.0)
    state = setup.run()[2]
    wanted = meshes.shardings(setup.state_specs, setup.mesh)
    kept = jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, wanted
    )
    assert all(jax.tree.leaves(kept))
    moment = jax.tree.leaves(state.optimizer)
    assert any(not leaf.is_fully_replicated for leaf in moment)


@pytest.mark.parametrize("data, fsdp", [(4, 1), (2, 2)])
def test_any_mesh_learns_the_same(data, fsdp):
    """Oracle: an invariance; sums over devices differ by fp32 rounding only.

    Adam's first steps have the size of the learning rate (1e-3) whatever the gradient,
    so rounding shows where a gradient is nearly 0: hence the tolerance of 1e-4.
    """
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        on_mesh(1)[2],
        on_mesh(data, fsdp)[2],
    )


def test_noise_belongs_to_the_sample():
    """Oracle: an invariance; another microbatch size leaves the initial noise alone."""
    sampler = rollout.Sampler(lambda *a: a[1], (1.0, 0.0), "ode", 0.0)
    key, shape = jax.random.key(0), (2, 2, 1)
    numbers = jnp.arange(6)
    whole = rollout.initial_noise(sampler, key, numbers // 3, numbers % 3, shape)
    part = rollout.initial_noise(sampler, key, numbers[4:] // 3, numbers[4:] % 3, shape)
    np.testing.assert_array_equal(whole[4:], part)
    shared = sampler.replace(shared_noise=True)
    same = rollout.initial_noise(shared, key, numbers // 3, numbers % 3, shape)
    np.testing.assert_array_equal(same[0], same[2])
    assert np.abs(same[0] - same[3]).max() > 0.1
