"""What the GenEval reward costs beside an iteration of SD3.5-medium, from shapes alone.

Compiles the detector (and CLIP's image tower for colours) ahead of time for eight TPU v5e
chips, no chip needed (pip install "jax[tpu]"; half an hour on two cores):

    python -m benchmarks.geneval_reward

Floating point operations are XLA's count of unscanned code; CLIP's layers are scanned, so
theirs come from a formula. The time is the sum of the compiler's own estimates of cycles,
which leaves out what overlaps; nothing here was run.
"""

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flowgrpo_jax.data.geneval_grammar import COCO80
from flowgrpo_jax.models.encoders.clip import CLIPVision, CLIPVisionConfig
from flowgrpo_jax.models.mask2former import network, swin
from flowgrpo_jax.models.mask2former.config import Mask2FormerConfig
from flowgrpo_jax.rewards.mask2former import Processor, detect

IMAGES, PIXELS, CHIPS = 48, 512, 8
CROPS = 2 * IMAGES  # two coloured objects in every image: more than any prompt set asks
CLOCK = 1.5e9  # Hz of a v5e
PEAK = 197e12  # bf16 operations per second of a v5e
# Operations for an image of SD3.5-medium at 512 pixels without guidance (docs/rewards.md).
FORWARD, DECODE, STEPS = 2.22e12, 2.515e12, 10
RECIPES = {
    "10 trained steps, KL": (10, 7.21e12),
    "3 trained steps, no KL": (3, 4.99e12),
}
SWIN_S = Mask2FormerConfig(swin.SwinConfig(depths=(2, 2, 18, 2)), COCO80)
VIT_L = CLIPVisionConfig(1024, 4096, 24, 16, projection_dim=768, patch_size=14)


def main() -> None:
    topology = topologies.get_topology_desc("v5e:2x4", platform="tpu")
    mesh = Mesh(np.array(topology.devices), ("image",))
    detector, seconds = compiled(
        mesh,
        lambda params, images: detect(SWIN_S, Processor(), params, images),
        network.shapes(SWIN_S),
        (IMAGES, PIXELS, PIXELS, 3),
    )
    operations = detector.cost_analysis()["flops"] * CHIPS
    report("Mask2Former, Swin-S", operations, seconds, IMAGES)
    memory = detector.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    print(f"  memory of a chip: {total / 2**30:.2f} GiB")

    tower = CLIPVision(VIT_L)
    pixels = (CROPS, VIT_L.image_size, VIT_L.image_size, 3)
    like = jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, *pixels[1:])))
    _, clip_seconds = compiled(
        mesh,
        lambda params, crops: tower.apply({"params": params}, crops).projected,
        like["params"],
        pixels,
        turns=VIT_L.num_hidden_layers,
    )
    clip_operations = CROPS * clip_formula(VIT_L)
    report("CLIP ViT-L/14, colours", clip_operations, clip_seconds, CROPS)

    operations, seconds = operations + clip_operations, seconds + clip_seconds
    for name, (trained, step) in RECIPES.items():
        iteration = IMAGES * (STEPS * FORWARD + trained * step + DECODE)
        floor = iteration / (PEAK * CHIPS)
        print(
            f"{name}: iteration of {IMAGES} images {iteration / 1e15:.2f} PFLOP, at "
            f"least {floor:.2f} s; the reward is {operations / iteration:.1%} of the "
            f"operations and at most {seconds / (seconds + floor):.1%} of the time"
        )


def compiled(mesh: Mesh, function, params, shape: tuple[int, ...], turns: int = 1):
    """The program for the mesh and the estimated seconds of one run.

    The compiler estimates a loop's body once; it runs `turns` times.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("image"))
    place = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        params,
    )
    images = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split)
    start = time.perf_counter()
    program = jax.jit(function, out_shardings=split).lower(place, images).compile()
    print(f"compiled for {mesh.size} chips in {time.perf_counter() - start:.0f} s")
    cycles = 0
    for line in program.as_text().splitlines():
        if found := re.search(r'"estimated_cycles":"(\d+)"', line):
            cycles += int(found[1]) * (turns if "while/body" in line else 1)
    return program, cycles / CLOCK


def clip_formula(config: CLIPVisionConfig) -> float:
    """Operations of one image in CLIP's tower: its matrix products."""
    width, tokens = (
        config.hidden_size,
        (config.image_size // config.patch_size) ** 2 + 1,
    )
    layer = tokens * (8 * width**2 + 4 * width * config.intermediate_size)
    layer += 4 * tokens**2 * width
    return config.num_hidden_layers * layer


def report(name: str, operations: float, seconds: float, images: int) -> None:
    print(
        f"{name}: {operations / images / 1e9:.0f} GFLOP an image, {images} images in an "
        f"estimated {1000 * seconds:.0f} ms on {CHIPS} v5e chips"
    )


if __name__ == "__main__":
    main()
