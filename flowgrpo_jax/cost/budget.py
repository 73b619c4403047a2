"""What one iteration of a run costs, by formula: passes, operations, bytes, seconds.

From the shapes and plans of a `Work` alone: nothing is compiled. `estimate` prints
all of it and adds what the compiler says; a run prints `summary` before it starts.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax.cost import flops, traffic
from flowgrpo_jax.cost.links import Way
from flowgrpo_jax.cost.traffic import Rounds, Traffic
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.engine import text_table
from flowgrpo_jax.engine.policy import PolicySpec
from flowgrpo_jax.engine.workload import PolicyWork, PretrainingWork, Work
from flowgrpo_jax.models.denoiser import Denoiser
from flowgrpo_jax.models.flow_model import FlowModel, overlay
from flowgrpo_jax.models.operations import Pass
from flowgrpo_jax.models.remat import POLICIES
from flowgrpo_jax.rl import summation


class Passes(NamedTuple):
    """How often the network is asked in an iteration, each image of a batch counted.

    `busiest_*` is the number of the device that has most to do: the others wait.
    """

    images: int
    sampling: int
    learning: int
    busiest_sampling: int
    busiest_learning: int


class Operations(NamedTuple):
    """Floating-point operations of one pass of each kind, guidance included.

    `rerun`: what `remat` computes again in a pass to learn from, not part of `learning`.
    """

    sampling: float
    decoding: float
    learning: float
    rerun: float


class Budget(NamedTuple):
    """Of one iteration; bytes are those of one device."""

    parameters: int
    trained: int
    passes: Passes
    forward: Pass
    operations: Operations
    bytes: dict[str, int | float]
    devices: int
    rounds: Rounds
    traffic: Traffic

    @property
    def total(self) -> float:
        """Operations of an iteration over all devices, nothing run twice."""
        passes, each = self.passes, self.operations
        return (
            passes.sampling * each.sampling
            + passes.images * each.decoding
            + passes.learning * each.learning
        )

    @property
    def busiest(self) -> Mapping[str, float]:
        """Operations of rollout and update on the device that has most to do."""
        passes, each = self.passes, self.operations
        images = -(-passes.images // self.devices)
        sampling = passes.busiest_sampling * each.sampling + images * each.decoding
        return {
            "rollout": sampling,
            "update": passes.busiest_learning * each.learning,
        }

    @property
    def waiting(self) -> float:
        """Share of the time that devices wait for the busiest one, on average."""
        return 1.0 - self.total / (self.devices * sum(self.busiest.values()))

    def computing(self, chip: flops.Chip) -> dict[str, float]:
        """Seconds of each program at the chip's full rate."""
        return {
            name: flops.seconds(count, chip) for name, count in self.busiest.items()
        }

    def travelling(self, paths: Mapping[str, Way]) -> dict[str, float]:
        """Seconds of each program in which bytes reach a device, axis by axis."""
        return {
            name: sum(count / paths[axis].rate for axis, count in by_axis.items())
            for name, by_axis in self.traffic.by_program.items()
        }

    def floor(self, chip: flops.Chip, paths: Mapping[str, Way] | None = None) -> float:
        """Seconds of an iteration: of each program, the slower of compute and links.

        Without `paths` of compute alone.
        """
        computing = self.computing(chip)
        links = self.travelling(paths) if paths else dict.fromkeys(computing, 0.0)
        return sum(max(computing[name], links[name]) for name in computing)


def of(work: Work) -> Budget:
    """The budget of a run's workload."""
    model = work.model
    forward = model.denoiser.cost(model.image_tokens, model.text_tokens)
    passes, rounds, latents = _passes(work)
    frozen, state = work.resident()
    return Budget(
        parameters=flops.parameters(overlay(frozen, state.trainable)["transformer"]),
        trained=flops.parameters(work.trainable),
        passes=passes,
        forward=forward,
        operations=_operations(work, model.denoiser, forward),
        bytes=_bytes(work, latents),
        devices=work.mesh.size,
        rounds=rounds,
        traffic=traffic.of(work, rounds, passes.images, model.denoiser.remat),
    )


def with_remat(work: Work, costs: Budget, remat: str) -> Budget:
    """The budget `costs` of this workload, had it another `remat`."""
    denoiser = work.model.denoiser.with_options(remat=remat)
    images = costs.passes.images
    return costs._replace(
        operations=_operations(work, denoiser, costs.forward),
        bytes=costs.bytes | {"activations": _activations(work, denoiser)},
        traffic=traffic.of(work, costs.rounds, images, remat),
    )


def _learning_branches(work: Work) -> int:
    """Passes per sample to learn from it: guidance may ask the network twice."""
    return work.model.passes(work.learner.guidance_scale)


def _operations(work: Work, denoiser: Denoiser, forward: Pass) -> Operations:
    rows, columns, _ = work.model.latent_shape
    sampled = work.guidance_scale if isinstance(work, PolicyWork) else 1.0
    branches = work.model.passes(sampled)
    learned = _learning_branches(work)
    references = len(work.needs - {"old_velocity"})
    learning = flops.trained_pass(
        forward, lora=work.learner.partly, references=references
    )
    policy = POLICIES[denoiser.remat]
    rerun = forward.linear * policy.again[0 if work.learner.partly else 1]
    rerun += forward.attention * policy.attention
    return Operations(
        sampling=branches * forward.total,
        decoding=work.model.autoencoder.decode_operations(rows, columns),
        learning=learned * learning,
        rerun=learned * rerun,
    )


def _passes(work: Work) -> tuple[Passes, Rounds, float]:
    """Passes and rounds of an iteration, and bytes of latents that a device holds."""
    devices = work.mesh.size
    size = 4.0 * np.prod(work.model.latent_shape)
    if isinstance(work, PretrainingWork):
        images = work.scenes_per_iteration
        most = -(-images // devices)
        rounds = Rounds(0, -(-most // work.learner.microbatch), 1)
        return Passes(images, 0, images, 0, most), rounds, most * size
    jobs, packed, update_batch = work.first_iteration()
    tables, weight = packed.tables, np.asarray(update_batch.weight) != 0
    sampling = np.asarray(tables.used).reshape(devices, -1).sum(axis=1)
    # Siblings share the pass of their state; samples have one each.
    learning = weight if work.learns_from_samples else weight.any(axis=-1)
    learning = learning.reshape(len(weight), devices, -1).sum(axis=-1)
    shared = work.mesh.shape["fsdp"]
    turns = np.asarray(tables.rounds).reshape(devices // shared, shared, -1)
    batches = weight.any(axis=(2, 3)).reshape(
        len(weight), devices // shared, shared, -1
    )
    rounds = Rounds(
        sampling=int(turns.max(axis=1).sum(axis=-1).max()),
        learning=int(batches.any(axis=2).sum(axis=-1).max(axis=1).sum()),
        updates=len(weight),
    )
    packs = len(tables.rounds) // devices
    states, siblings = tables.action.shape[1:]
    stored = 1 + siblings + ("old_velocity" in work.needs)
    kept = packs * (states * stored + tables.leaf.start.shape[1])
    # Latents, velocities and noise of the pack that is being sampled.
    moving = 2 * tables.prompt[0].size + tables.noise.prompt.shape[1]
    passes = Passes(
        images=sum(len(job.plan.leaves) for job in jobs),
        sampling=int(sampling.sum()),
        learning=int(learning.sum()),
        busiest_sampling=int(sampling.max()),
        busiest_learning=int(learning.max(axis=1).sum()),
    )
    return passes, rounds, float((kept + moving) * size)


def _largest_block(work: Work, tree: Any, specs: Any) -> int:
    """Parameters of the largest block among those that are split over devices.

    A block is made whole when it is read. Blocks of one kind are one leaf, with a
    leading dimension: what is split are matrices, its last two.
    """
    sizes: Counter[str] = Counter()

    def add(path, leaf, spec) -> None:
        if any(axis and work.mesh.shape[axis] > 1 for axis in spec):
            sizes[jax.tree_util.keystr(path[:2])] += math.prod(leaf.shape[-2:])

    jax.tree_util.tree_map_with_path(add, tree, specs)
    return max(sizes.values(), default=0)


def _activations(work: Work, denoiser: Denoiser) -> float:
    tokens = work.model.image_tokens + work.model.text_tokens
    images = _learning_branches(work) * work.learner.microbatch
    return images * denoiser.kept_bytes(tokens)


def _bytes(work: Work, latents: float) -> dict[str, int | float]:
    """Bytes of one device by kind, at most of what lives at one time."""
    frozen, state = work.resident()
    item = jnp.dtype(work.learner.dtype).itemsize
    trained = _largest_block(work, work.trainable, work.trainable_specs)
    read = max(trained, _largest_block(work, work.frozen, work.frozen_specs))
    # In fp32 their sum, in shards like that of one microbatch, in whose backward pass
    # the gradient of a block is whole.
    shards = sum(
        4 * flops.bytes_on_device(leaf) // leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state.trainable)
    )
    shards *= summation.ROWS if work.learner.exact else 1
    own = flops.bytes_on_device(state.trainable)
    return {
        "weights": flops.bytes_on_device(frozen),
        "training state": flops.bytes_on_device(state),
        "gathered weights": item * read,
        "gradients": shards + own + 4 * trained,
        "latents": latents,
        "activations": _activations(work, work.model.denoiser),
    }


# -- in words -------------------------------------------------------------------------


def gigabytes(count: int | float) -> str:
    return f"{count / flops.GB:.2f} GB"


def operations(count: float) -> str:
    """Floating-point operations with a unit that fits."""
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count / 1e9:.3g} GFLOP"


def floor_line(
    budget: Budget, chip_name: str, paths: Mapping[str, Way] | None = None
) -> str:
    """The floor time and the share of the peak that it takes for granted."""
    chip = flops.CHIPS[chip_name]
    line = (
        f"at least {budget.floor(chip, paths):.1f} s on {budget.devices} {chip_name} "
        f"at 100% of {chip.rate / flops.TERA:.0f} TFLOP/s each (dense bf16)"
    )
    slower = paths and budget.floor(chip, paths) > budget.floor(chip)
    return line + ", or of the links, which are slower" * bool(slower)


def travelled(count: float) -> str:
    """Bytes with a unit that fits."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count / 1e3:.4g} kB"


def links_lines(budget: Budget, paths: Mapping[str, Way], chip_name: str) -> list[str]:
    """What reaches a device over the links of each axis, and how long that takes."""
    if budget.devices == 1:
        return ["nothing travels: one device"]
    parts = [
        f"{name} {travelled(count)}"
        for name, count in budget.traffic._asdict().items()
        if count
    ]
    used = {axis for way in budget.traffic.by_program.values() for axis in way}
    rates = [
        f"{axis} at {path.rate / flops.GB:.4g} GB/s by {path.name}"
        for axis, path in paths.items()
        if axis in used
    ]
    links, computing = (
        budget.travelling(paths),
        budget.computing(flops.CHIPS[chip_name]),
    )
    beside = ", ".join(
        f"{links[name]:.1f} s of the {name} beside {computing[name]:.1f} s of computing"
        for name in links
    )
    return [
        f"{', '.join(parts)}: {travelled(sum(budget.traffic))} to each device",
        f"{'; '.join(rates)}: at least {beside}",
    ]


def memory_line(budget: Budget) -> str:
    """Bytes of a device by kind, those that are not zero."""
    parts = [f"{name} {gigabytes(n)}" for name, n in budget.bytes.items() if n]
    return f"{', '.join(parts)}: {gigabytes(sum(budget.bytes.values()))}"


def prompt_bytes(model: FlowModel) -> int:
    """Bytes of one encoded prompt."""
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(model.text_shape())
    )


def text_line(
    spec: PolicySpec,
    model: FlowModel,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    folder: str,
) -> str:
    """How many prompts a run has encoded at most, and what their embeddings take."""
    most = spec.num_iterations * spec.prompts_per_iteration
    trained = min(most, len({prompt.text for prompt in prompts}))
    count = trained + len({prompt.text for prompt in held_out} | {""})
    size = prompt_bytes(model)
    return (
        f"at most {count:,} prompts to encode, {size / 1e6:.2f} MB each, "
        f"{gigabytes(count * size)} in {folder}; of those to train on "
        f"{text_table.BLOCK:,} at a time, when they are needed"
    )


def summary(work: Work, device_kind: str) -> list[str]:
    """The plan of a run in three lines."""
    budget, mesh = of(work), dict(work.mesh.shape)
    passes = budget.passes
    chip = flops.chip_name(device_kind)
    time = f"; {floor_line(budget, chip)}" if chip else ""
    where = " x ".join(f"{name} {size}" for name, size in mesh.items())
    return [
        f"plan: {work.model.name}, {budget.parameters:,} parameters, "
        f"{budget.trained:,} trained; mesh {where} of {device_kind}",
        f"iteration: {passes.images:,} images, {passes.sampling:,} evaluations to "
        f"sample, {passes.learning:,} to learn from; {operations(budget.total)}{time}",
        f"memory of a device: {memory_line(budget)}",
    ]
