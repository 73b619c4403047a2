"""Forward, rollout, update and log-prob gap beside diffusers on torch, in one run.

    python -m benchmarks.real_size --size=sd3.5-medium --table=docs/performance.md

Random weights; no VAE, no text encoders. The peer is diffusers'
SD3Transformer2DModel (eager and, on a GPU, torch.compile) with PEFT's LoRA, in loops as
Flow-GRPO's scripts have them; torch chooses its attention kernel, cuDNN first on a GPU.
Both compute in bf16 on a GPU and in fp32 on one thread of a CPU, where the ratio tells of
XLA's and torch's kernels and not of this package: `small` only shows that all of it runs.
Ours and the peer's take turns; the least of the repeats after a warm-up is told, on a CPU
in seconds of the CPU, since others may be at work there.
"""

import argparse
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import torch_peer
from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax.cost import flops
from flowgrpo_jax.engine import programs
from flowgrpo_jax.models.flow_model import FlowModel, IdentityAutoencoder, overlay
from flowgrpo_jax.models.sd3 import presets
from flowgrpo_jax.models.sd3.denoiser import SD3Denoiser
from flowgrpo_jax.models.sd3.transformer_config import MMDiTConfig
from flowgrpo_jax.runtime import mesh as meshes

GUIDANCE, BETA = 4.5, 0.04


@dataclasses.dataclass(frozen=True)
class Size:
    """A transformer as its config.json says, and one group of Flow-GRPO for it."""

    transformer: dict[str, Any]
    side: int = 64  # latent pixels
    tokens: int = 205  # of text
    group: int = 24
    steps: int = 10
    microbatch: int = 24  # images; with guidance twice as many passes
    rank: int = 32


_TINY = {
    "sample_size": 8,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "caption_projection_dim": 32,
    "joint_attention_dim": 48,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 8,
    "dual_attention_layers": [0],
}
SIZES = {
    "small": Size(
        presets.TRANSFORMERS["sd3.5-medium"] | _TINY, 8, 7, 4, 3, microbatch=4, rank=4
    ),
    "sd3.5-medium": Size(presets.TRANSFORMERS["sd3.5-medium"]),
    "sd3.5-large": Size(presets.TRANSFORMERS["sd3.5-large"], microbatch=12),
}
ROWS = {
    "g1": "forward, guided, of one microbatch",
    "g3": "rollout of a group, guided",
    "g5": "LoRA update on its trained steps, guided, with KL",
    "g11": "largest difference of log-probs, rollout and first update",
}


class Ours:
    """This package's programs with random weights on the first device."""

    def __init__(self, size: Size, remat: str):
        self.dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
        self.config = config = configs.make(
            prompts_per_iteration=1,
            group_size=size.group,
            updates_per_iteration=1,
            microbatch=size.microbatch,
            dtype=self.dtype,
            remat=remat,
            mesh={"data": 1},
            sample__num_steps=size.steps,
            sample__guidance_scale=GUIDANCE,
            train__beta=BETA,
            train__lora_rank=size.rank,
            train__lora_alpha=2.0 * size.rank,
        )
        network = SD3Denoiser(MMDiTConfig.from_dict(size.transformer)).with_options(
            lora_rank=size.rank,
            lora_alpha=2.0 * size.rank,
            dtype=jnp.dtype(self.dtype),
        )
        model = FlowModel(
            "random",
            network,
            IdentityAutoencoder(),
            (size.side, size.side, 16),
            size.tokens,
        )
        mesh = meshes.make_mesh({"data": 1}, jax.devices()[:1])
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(self.dtype)),
            jax.eval_shape(model.init, jax.random.key(0)),
        )
        self.work = work = assemble.make_work(config, mesh, model, like)
        self.frozen = _random(like, 0.02, 0)
        self.state = work.initial_state(_random(work.trainable, 0.02, 1))
        self.text, self.empty = (
            _random(model.text_shape(), 1.0, seed) for seed in (2, 3)
        )
        _, self.packed, update_batch = work.first_iteration()
        self.tables = meshes.place(self.packed.tables, programs.PACKS, mesh)
        self.update_batch = meshes.place(update_batch, programs.SPLIT, mesh)
        self.key = meshes.random_key(mesh, 0)
        self.sampler = assemble.make_sampler(config, work.model)
        self._forward = jax.jit(self.sampler.velocity)
        self.trained_steps = int(np.count_nonzero(update_batch.weight))
        self.gap = None

    def forward(self):
        count = self.config.microbatch
        latents = jnp.ones((count, *self.work.model.latent_shape))
        text = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), self.text)
        policy = overlay(self.frozen, self.state.trainable)
        sigma = jnp.full(count, 0.5)
        return jax.block_until_ready(
            self._forward(policy, latents, sigma, text, self.empty)
        )

    def rollout(self):
        policy = overlay(self.frozen, self.state.trainable)
        arguments = (policy, self.key, self.tables, self.text, self.empty)
        self.made = jax.block_until_ready(self.work.rollout(*arguments))

    def update(self):
        self.state, info = jax.block_until_ready(
            self.work.update(
                self.state,
                self.frozen,
                self.work.experience(self.made),
                self.update_batch,
                self.key,
                self.text,
                self.empty,
            )
        )
        if self.gap is None:  # of the first one: policy and behaviour are the same
            self.gap = float(info["ratio_gap"][0])


def _random(like: Any, scale: float, seed: int) -> Any:
    """Normal numbers of these shapes and types, on the device leaf by leaf."""
    rng = np.random.default_rng(seed)

    def make(leaf):
        drawn = scale * rng.standard_normal(leaf.shape, np.float32)
        return jax.device_put(drawn.astype(leaf.dtype))

    return jax.tree.map(make, like)


def matrix_rate(dtype: str, side: int) -> float:
    """Operations per second of one square product: the ceiling of this run."""
    a = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a: a @ a)
    taken = least_seconds({"product": lambda: jax.block_until_ready(product(a))}, 5)
    return 2.0 * side**3 / taken["product"]


def least_seconds(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Least seconds of each, taken in turns after one run that does not count."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            begin = clock()
            run()
            if repeat:
                seconds[name].append(clock() - begin)
    return {name: min(values) for name, values in seconds.items()}


def measure(name: str, repeats: int, remat: str) -> tuple[str, list[list[str]]]:
    """(a line about the machine, rows of the table)."""
    size = SIZES[name]
    ours = Ours(size, remat)
    peers = torch_peer.make(size, GUIDANCE, BETA)
    operations = _operations(ours, size)
    rate = matrix_rate(ours.dtype, 512 if name == "small" else 8192)
    rows = []
    for row, method in (("g1", "forward"), ("g3", "rollout"), ("g5", "update")):
        runs = {"ours": getattr(ours, method)}
        runs |= {kind: getattr(peer, method) for kind, peer in peers.items()}
        taken = least_seconds(runs, repeats)
        best = min(seconds for kind, seconds in taken.items() if kind != "ours")
        ratio = f"{best / taken['ours']:.2f}" if peers.keys() > {"eager"} else "-"
        cells = [f"{taken[k]:.4g}" if k in taken else "-" for k in _COLUMNS]
        share = operations[method] / taken["ours"] / rate
        rows.append([row, ROWS[row], *cells, ratio, f"{share:.0%}"])
    gaps = {"ours": ours.gap} | {kind: peer.gap for kind, peer in peers.items()}
    cells = [f"{gaps[k]:.2g}" if k in gaps else "-" for k in _COLUMNS]
    rows.append(["g11", ROWS["g11"], *cells, "", ""])
    machine = (
        f"{jax.devices()[0].device_kind} ({torch_peer.machine()}), jax {jax.__version__}, "
        f"{ours.dtype}, attention {ours.work.model.denoiser.attention}, remat {remat}, "
        f"microbatch {size.microbatch}, group {size.group}, {size.steps} steps, "
        f"{ours.trained_steps} trained; load {os.getloadavg()[0]:.1f}; a square product: {rate / flops.TERA:.3g} TFLOP/s"
    )
    return machine, rows


def _operations(ours: Ours, size: Size) -> dict[str, float]:
    """By formula; neither LoRA nor what remat runs again is counted."""
    network = ours.work.model.denoiser
    one = network.cost((size.side // 2) ** 2, size.tokens)
    step = flops.trained_pass(one, lora=True, references=1)
    return {
        "forward": 2 * size.microbatch * one.total,
        "rollout": 2 * size.group * size.steps * one.total,
        "update": 2 * ours.trained_steps * step,
    }


# -- the table ------------------------------------------------------------------------

_COLUMNS = ("ours", "eager", "compiled")
_HEAD = """# Performance

Written by `python -m benchmarks.real_size --size=SIZE --table=docs/performance.md`:
seconds of this package's programs beside diffusers on torch, in one run on one machine
(seconds of the CPU where that is the machine).
"peer / ours" takes the faster peer; the last column is the share of a matrix product's
rate, measured in the same run, by the formulas of `cost/flops.py`. Sizes without numbers were
not measured. On a CPU no ratio is told: it would be one of the kernels and call overheads
of XLA and torch; `small` only shows that all of it runs.
"""


def section(name: str, machine: str | None, rows: list[list[str]]) -> str:
    """The part of the document about one size."""
    if machine is None:
        rows = [[row, what, *["not measured"] * 5] for row, what in ROWS.items()]
    head = ["", "what", "ours, s", "torch eager, s", "compiled, s"]
    head += ["peer / ours", "of the matrix rate"]
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"## {name}\n\n{machine or 'No such machine was at hand.'}\n\n{table}\n"


def write(path: Path, name: str, text: str) -> None:
    """Put the section of this size in the place of the earlier one."""
    parts = {size: section(size, None, []) for size in SIZES}
    if path.exists():
        for part in path.read_text().split("\n## ")[1:]:
            parts[part.split("\n", 1)[0]] = f"## {part.rstrip()}\n"
    parts[name] = text
    path.write_text("\n".join([_HEAD, *parts.values()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    machine, rows = measure(options.size, options.repeats, options.remat)
    text = section(options.size, machine, rows)
    print(text)
    if options.table:
        write(options.table, options.size, text)


if __name__ == "__main__":
    main()
