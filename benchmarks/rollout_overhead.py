"""Time of a rollout of T steps over T guided forward passes of the same shapes.

Command: python benchmarks/rollout_overhead.py
The forward passes run in the same kind of loop over microbatches, under the same
mesh; what is left is noise, transitions, log-probs and bookkeeping. Interleaved
repeats, medians.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import specs
from flowgrpo_jax.engine import programs, text_table
from flowgrpo_jax.engine.planner import Planner
from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.runtime import platform

PROMPTS, GROUP, REPEATS = 8, 16, 15


def main(_):
    config = configs.make(
        prompts_per_iteration=PROMPTS,
        group_size=GROUP,
        train__use_lora=False,
        updates_per_iteration=1,
    )
    mesh = meshes.make_mesh(specs.mesh_shape(config))
    model, variables = assemble.load_model(config)
    variable_specs = meshes.specs(variables, model.denoiser.sharding_rules, mesh)
    sampler = assemble.make_sampler(config, model)
    table = text_table.make(model, variables, ["a photo of a red circle"] * PROMPTS)
    text = meshes.place(
        table.rows(["a photo of a red circle"] * PROMPTS), programs.WHOLE, mesh
    )
    empty = meshes.place(table.empty, programs.WHOLE, mesh)
    variables = meshes.place(variables, variable_specs, mesh)
    planner = Planner(specs.plan_spec(config), mesh.size)
    packed = planner.pack(planner.jobs(0))
    tables = meshes.place(packed.tables, programs.PACKS, mesh)
    numbers = np.arange(PROMPTS * GROUP, dtype=np.int32) // GROUP
    prompts = meshes.place(numbers.reshape(-1, config.microbatch), programs.PACKS, mesh)
    key = meshes.random_key(mesh, 0)
    rollout = programs.make_rollout(mesh, variable_specs, sampler, model.latent_shape)
    sigmas = jnp.asarray(sampler.sigmas)

    def forward_passes(variables, prompts, text, empty, start):
        text_of = programs.text_lookup(text, empty)

        def one_batch(prompt):
            def step(latent, sigma):
                steps = jnp.full(prompt.shape, sigma)
                return sampler.velocity(
                    variables, latent, steps, *text_of(prompt)
                ), None

            latent = jnp.broadcast_to(start, (*prompt.shape, *model.latent_shape))
            return jax.lax.scan(step, latent, sigmas[:-1])[0]

        return jax.lax.map(one_batch, prompts)

    whole, split = programs.WHOLE, programs.PACKS
    forward = jax.jit(
        jax.shard_map(
            forward_passes,
            mesh=mesh,
            in_specs=(variable_specs, split, whole, whole, whole),
            out_specs=split,
            check_vma=False,
        )
    )
    start = meshes.place(jnp.ones(()), whole, mesh)
    runs = {
        "rollout": lambda: rollout(variables, key, tables, text, empty),
        "forward": lambda: forward(variables, prompts, text, empty, start),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(REPEATS + 2):
        for name, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            if repeat >= 2:  # the first ones compile and warm up
                seconds[name].append(time.perf_counter() - begin)
    ratio = statistics.median(
        a / b for a, b in zip(seconds["rollout"], seconds["forward"], strict=True)
    )
    print(
        f"jax {jax.__version__}, {jax.device_count()} {jax.devices()[0].device_kind} devices"
    )
    print(
        f"{PROMPTS * GROUP} images, {sampler.num_steps} guided steps, microbatch "
        f"{config.microbatch}: rollout {statistics.median(seconds['rollout']):.3f} s, "
        f"forward passes {statistics.median(seconds['forward']):.3f} s, "
        f"median ratio {ratio:.3f}"
    )


if __name__ == "__main__":
    platform.configure()
    app.run(main)
