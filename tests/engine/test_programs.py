"""Rollout and update as compiled programs: on-policy, and the same on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import specs
from flowgrpo_jax.engine import credit, programs
from flowgrpo_jax.engine.planner import Planner
from flowgrpo_jax.flow import packing, plan, rollout
from flowgrpo_jax.models.sd3.sharding import SHARDING_RULES
from flowgrpo_jax.rl import update as rl_update
from flowgrpo_jax.runtime import mesh as meshes
from tests.tiny import tiny_model

PROMPTS, UPDATES, STEPS = 4, 2, 4
TEXTS = ["a photo of a red circle", "two squares", "a cross above a ring", "circle"]
# Every step of every member; one step that a group shares; several of them, each
# finished at two granularities.
PLANS = {
    "all": {},
    "branch": {
        "sample__plan": "branch",
        "sample__init_noise": "shared",
        "sample__sde_window_size": 1,
        "sample__sde_window_range": (0, 3),
    },
    "g2rpo": {
        "sample__plan": "branch",
        "sample__init_noise": "shared",
        "sample__branch_steps": (0, 2),
        "sample__granularities": (1, 2),
        "train__advantage_key": "step",
    },
}


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
        plan_name="all",
    ):
        self.mesh, self.group_size = mesh, group_size
        self.config = config = configs.make(
            prompts_per_iteration=PROMPTS,
            group_size=group_size,
            updates_per_iteration=UPDATES,
            microbatch=microbatch,
            sample__num_steps=STEPS,
            sample__guidance_scale=guidance,
            **PLANS[plan_name],
        )
        self.model, variables = tiny_model(4 if lora else 0, dtype)
        names = ("lora",) if lora else ("transformer",)
        trainable = {name: variables[name] for name in names}
        frozen = {k: v for k, v in variables.items() if k not in names or not lora}
        self.specs = [
            meshes.specs(tree, SHARDING_RULES, mesh) for tree in (trainable, frozen)
        ]
        self.trainable = meshes.place(trainable, self.specs[0], mesh)
        self.frozen = meshes.place(frozen, self.specs[1], mesh)
        sampler = assemble.make_sampler(config, self.model)
        self.rollout = programs.make_rollout(
            mesh,
            self.specs[1] | self.specs[0],
            sampler,
            self.model.latent_shape,
            dtype,
        )
        self.optimizer = rl_update.make_optimizer(
            rl_update.OptimizerSpec("adamw", 1e-3, 0.0, 1e-10, 1.0)
        )
        shapes = jax.eval_shape(
            lambda part: rl_update.init_state(part, self.optimizer), trainable
        )
        self.state_specs = meshes.specs(shapes, SHARDING_RULES, mesh)
        self.update = programs.make_update(
            mesh,
            self.state_specs,
            self.specs[1],
            assemble.make_loss(config, self.model, sampler),
            assemble.fixed_policies(config),
            programs.fetch_transitions,
            self.optimizer,
            rl_update.Ema(0.9, 8),
            dtype=dtype,
        )
        planner = Planner(specs.plan_spec(config), mesh.size)
        self.jobs = planner.jobs(0)
        self.packed = planner.pack(self.jobs)

    def place(self, tree, spec=programs.WHOLE):
        return meshes.place(tree, spec, self.mesh)

    @functools.cached_property
    def inputs(self):
        """(key, text, empty) of both programs."""
        ids = self.model.tokenizer([*TEXTS, ""])
        table = jax.jit(self.model.encode_text)({"text": self.frozen["text"]}, ids)
        table = jax.device_get(table)
        text = self.place(jax.tree.map(lambda rows: rows[:PROMPTS], table))
        empty = self.place(jax.tree.map(lambda rows: rows[PROMPTS:], table))
        return meshes.random_key(self.mesh, 0), text, empty

    def sample(self):
        """The rollout's result."""
        key, text, empty = self.inputs
        tables = self.place(self.packed.tables, programs.PACKS)
        return self.rollout(self.frozen | self.trainable, key, tables, text, empty)

    def learn(self):
        """(updated state, measurements) after a rollout and two updates."""
        transitions = self.sample().transitions
        key, text, empty = self.inputs
        edges = sum(len(job.plan.trained) for job in self.jobs)
        advantage = np.linspace(-1, 1, edges, dtype=np.float32)
        advantage[: edges // PROMPTS] = 0  # a group that teaches nothing
        update_batch = credit.batch_of_actions(
            specs.update_spec(self.config),
            self.jobs,
            self.packed,
            advantage,
            self.mesh.size,
        )
        state = jax.jit(
            lambda part: rl_update.init_state(part, self.optimizer),
            out_shardings=meshes.shardings(self.state_specs, self.mesh),
        )(jax.tree.map(jnp.copy, self.trainable))
        placed = self.place(update_batch, programs.SPLIT)
        return self.update(state, self.frozen, transitions, placed, key, text, empty)


def mesh_of(data: int, fsdp: int = 1) -> jax.sharding.Mesh:
    devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    kinds = (jax.sharding.AxisType.Auto,) * 2
    return jax.sharding.Mesh(devices, meshes.AXES, axis_types=kinds)


@functools.cache
def on_mesh(data: int, fsdp: int = 1, plan_name: str = "all"):
    """Host copies of transitions and images, in the order of prompts."""
    setup = Setup(mesh_of(data, fsdp), False, 2.5, plan_name=plan_name)
    made = setup.sample()
    return [
        packing.collect(leaf, setup.packed)
        for leaf in jax.device_get(jax.tree.leaves((made.transitions, made.clean)))
    ]


@pytest.mark.parametrize(
    "dtype, lora, guidance, plan_name",
    [
        (jnp.float32, False, 2.5, "all"),
        (jnp.bfloat16, True, 2.5, "all"),
        (jnp.bfloat16, True, 1.0, "g2rpo"),
        # With these, any two choices of type, what is trained and guidance meet.
        pytest.param(jnp.float32, True, 1.0, "all", marks=pytest.mark.more),
        pytest.param(jnp.bfloat16, False, 1.0, "all", marks=pytest.mark.more),
        pytest.param(jnp.float32, False, 2.5, "branch", marks=pytest.mark.more),
    ],
)
def test_first_update_is_on_policy(dtype, lora, guidance, plan_name):
    """Oracle: an invariance; the same weights give the same log-prob, bit for bit.

    Microbatches of 8: below, XLA's own reductions happened to agree.
    """
    setup = Setup(mesh_of(1), lora, guidance, dtype, 8, 8, plan_name)
    info = setup.learn()[1]
    assert float(info["ratio_gap"][0]) == 0.0
    # The second update is not: the first one moved the policy.
    assert float(info["ratio_gap"][1]) > 0.0


@pytest.mark.parametrize(
    "data, fsdp, plan_name",
    [
        (2, 1, "all"),
        (2, 2, "all"),
        (8, 1, "g2rpo"),
        pytest.param(4, 1, "all", marks=pytest.mark.more),
        pytest.param(8, 1, "all", marks=pytest.mark.more),
        pytest.param(2, 1, "branch", marks=pytest.mark.more),
    ],
)
def test_any_mesh_gives_the_same_samples(data, fsdp, plan_name):
    """Oracle: an invariance; images and log-probs are bitwise equal to one device's."""
    alone = on_mesh(1, plan_name=plan_name)
    for mine, other in zip(alone, on_mesh(data, fsdp, plan_name), strict=True):
        np.testing.assert_array_equal(mine, other)


def linear_velocity(variables, latents, sigma, shift):
    """A flow whose steps are easy to follow by hand."""
    return (
        variables["w"] * latents * sigma[:, None, None, None]
        + shift[:, None, None, None]
    )


def carried_out(made, sampler, microbatch=3, prompts=2):
    """A plan's rollout for some prompts, each with its own velocity; numpy results."""
    shape = packing.shape_of([made], prompts, microbatch)
    jobs = [packing.Job(n, made) for n in range(prompts)]
    packed = packing.pack_all(packing.Packer(shape, microbatch), jobs, prompts, 1)
    shifts = jnp.linspace(-0.5, 0.5, prompts)
    result = jax.jit(
        lambda tables: rollout.rollout(
            sampler,
            {"w": jnp.float32(0.3)},
            jax.random.key(1),
            tables,
            lambda prompt: (shifts[prompt],),
            (2, 3, 1),
        )
    )(packed.tables)
    return result, packed, np.asarray(shifts)


@pytest.mark.parametrize(
    "made",
    [
        plan.branches(6, (0, 2, 3), 4, granularities=(1, 2, 3), whole_anchor=True),
        plan.branches(6, (1,), 3, merge=(2,), anchors=2),
        plan.chains(6, (1, 2), ((1,), (2,), (1, 2)), shared=True),
        plan.tree(6, (0, 2), 2, (0, 1, 2), (0, 1)),
        plan.chains(4, (0, 1, 2, 3), ((0, 1, 2, 3),) * 2, probe=2),
    ],
)
def test_packed_paths_are_what_they_are_alone(made):
    """Oracle: every leaf's path, walked one step at a time in float64 numpy."""
    sigmas = np.linspace(1, 0, made.num_steps + 1)
    sampler = rollout.Sampler(linear_velocity, tuple(map(float, sigmas)), "dance", 0.4)
    result, packed, shifts = carried_out(made, sampler)
    assert result.evaluations[0] == 2 * len(made.evaluated)
    clean = packing.collect(np.asarray(result.clean), packed)
    key = jax.random.key(1)

    @functools.cache
    def noise(prompt, member, counter):
        one = jax.random.fold_in(jax.random.fold_in(key, prompt), member)
        return np.asarray(
            jax.random.normal(jax.random.fold_in(one, counter), (6,)), np.float64
        ).reshape(2, 3, 1)

    @functools.cache
    def latent(prompt, node):
        parent, at, member, _, _ = made.nodes[node]
        if parent < 0:
            return noise(prompt, member, 0)
        start = made.nodes[parent].at
        x, dt = latent(prompt, parent), sigmas[at] - sigmas[start]
        v = 0.3 * x * sigmas[start] + shifts[prompt]
        if member < 0:
            return x + v * dt
        pull = 0.4**2 / (2 * sigmas[start]) * dt
        mean = x + v * dt + pull * (x + (1 - sigmas[start]) * v)
        return mean + 0.4 * np.sqrt(-dt) * noise(prompt, member, start + 1)

    for prompt in range(2):
        wanted = np.array([latent(prompt, int(leaf)) for leaf in made.leaves])
        np.testing.assert_allclose(clean[prompt], wanted, atol=2e-6)
    before, after = (
        packing.collect(np.asarray(x), packed)
        for x in (result.transitions.latent, result.transitions.next_latent)
    )
    for number, (node, actions) in enumerate(made.states):
        np.testing.assert_allclose(before[0, number], latent(0, node), atol=2e-6)
        for sibling, action in enumerate(actions):
            np.testing.assert_allclose(
                after[0, number, sibling], latent(0, action), atol=2e-6
            )


def test_correlated_starts():
    """Oracle: closed form; members share 1 - d^2 of the first noise's variance."""
    made = plan.chains(1, (), ((),) * 500)
    sampler = rollout.Sampler(linear_velocity, (1.0, 0.0), "ode", 0.0, correlation=0.6)
    sampler = sampler.replace(velocity=lambda variables, x, sigma, shift: 0 * x)
    result, packed, _ = carried_out(made, sampler, microbatch=50, prompts=2)
    starts = packing.collect(np.asarray(result.clean), packed).reshape(2, 500, 6)
    own = starts - starts.mean(1, keepdims=True)
    assert abs(own.std() - 0.6) < 0.02
    shared = starts.mean(1)
    assert np.abs(shared[0] - shared[1]).max() > 0.1
