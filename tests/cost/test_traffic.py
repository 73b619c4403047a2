"""Bytes between devices: by formula, by hand, and as a compiled program moves them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax.cost import budget, flops, hlo, links
from flowgrpo_jax.runtime import mesh as meshes


def costs_on(shape, devices=8, **values):
    config = configs.make("model=sd3.5-medium", microbatch=4, remat="full", **values)
    mesh = meshes.make_abstract_mesh(shape, devices)
    model = assemble.abstract_model(config)
    return budget.of(assemble.make_policy_work(config, mesh, *model))


def test_a_lora_whose_base_is_split():
    """Oracle: by hand; 2.235 G split parameters in bf16, of which 7/8 come from others.

    Sampling is 1,440 images a device, 360 microbatches; learning 324, each of which
    gathers forward, backward and for the base model.
    """
    made = costs_on({"fsdp": 8})
    assert made.rounds == (360, 324, 2)
    whole = 2 * 7 / 8 * (2_243_171_520 - 8.3e6)
    assert made.traffic.rollout == pytest.approx(360 * whole, rel=2e-3)
    assert made.traffic.update == pytest.approx(3 * 324 * whole, rel=2e-3)
    assert made.traffic.gradients == 0
    # A ring's sum passes each number twice, less the device's own part; two updates.
    assert made.traffic.sums == pytest.approx(2 * 2 * 7 / 8 * 4 * 18_776_064, rel=1e-6)
    assert made.traffic.scores == 4 * 1152


def test_gradients_of_all_parameters():
    """Oracle: by hand; in fp32, into shards after every microbatch, then over `data`."""
    made = costs_on({"data": 2, "fsdp": 4}, train__use_lora=False)
    split, small = 2_243_171_520 - 8.3e6, 8.3e6
    each = made.rounds.learning * 4 * 3 / 4 * split
    assert made.traffic.gradients == pytest.approx(each, rel=2e-3)
    sums = 2 * 4 * (split / 4 * 2 * 1 / 2 + small * 2 * 7 / 8)
    assert made.traffic.sums == pytest.approx(sums, rel=1e-2)


def test_the_floor_is_the_slower_of_compute_and_links():
    """Oracle: by hand; a link of a byte a second, and one that takes no time."""
    made, chip = costs_on({"fsdp": 8}), flops.CHIPS["v5e"]
    slow = dict.fromkeys(meshes.AXES, links.Way(1.0, ""))
    fast = dict.fromkeys(meshes.AXES, links.Way(1e30, ""))
    assert made.floor(chip, fast) == made.floor(chip)
    travels = sum(made.traffic) - made.traffic.scores
    assert made.floor(chip, slow) == pytest.approx(travels)


@pytest.mark.parametrize(
    "kind, sides, rate",
    [
        ("v5e", (2, 4), 100),  # a corner has two neighbours
        ("v5e", (16, 16), 200),  # a whole torus: four
        ("v6e", (8, 16), 300),
        ("v5p", (2, 2, 2), 300),
        ("v5p", (4, 4, 4), 600),
        ("v5e", (1, 1), np.inf),
    ],
)
def test_ports_of_a_slice(kind, sides, rate):
    """Oracle: by hand, from the pages that `links` names."""
    ways = links.paths(kind, sides, {"data": 1, "fsdp": 8})
    assert ways["fsdp"].rate == rate * flops.GB and "ICI" in ways["data"].name


def test_gpus_of_several_hosts():
    """Oracle: by hand; `fsdp` inside a host, `data` from host to host."""
    ways = links.paths("H100", (16,), {"data": 2, "fsdp": 8})
    assert ways["fsdp"].rate == 450 * flops.GB and ways["data"].rate == 50 * flops.GB
    assert links.paths("H100", (8,), {"data": 2, "fsdp": 4})["data"].name == "NVLink"


# As XLA prints them, shortened: a loop of three rounds whose body gathers beside a
# product, and sums; a conditional; a loop whose end is no constant.
TEXT = """\
HloModule jit_program

%start (p: bf16[4,2]) -> (bf16[4,2]) {
  %all-gather.1 = bf16[4,16]{1,0} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, metadata={op_name="a/all_gather"}
  ROOT %custom-call.1 = (bf16[4,2]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%step (p: bf16[4,2]) -> (bf16[4,2]) {
  %all-gather.2 = bf16[4,16]{1,0} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, metadata={op_name="a/all_gather"}
  ROOT %tuple.1 = (bf16[4,2]{1,0}) tuple(%all-gather.2)
}

%body (p: (s32[], bf16[4,2])) -> (s32[], bf16[4,2]) {
  %fusion.1 = (bf16[4,2]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %fusion.2 = (bf16[4,2]{1,0}) fusion(%x), kind=kOutput, calls=%step
  ROOT %all-reduce.1 = f32[10]{0} all-reduce(%y), replica_groups=[2,4]<=[8], to_apply=%add, metadata={op_name="b/psum"}
}

%condition (p: (s32[], bf16[4,2])) -> pred[] {
  %constant.1 = s32[] constant(3)
  ROOT %lt.1 = pred[] compare(%i, %constant.1), direction=LT
}

%open (p: (s32[], s32[])) -> pred[] {
  ROOT %lt.2 = pred[] compare(%i, %j), direction=LT
}

%side (p: f32[8]) -> f32[1] {
  ROOT %reduce-scatter.1 = f32[1]{0} reduce-scatter(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

%other (p: f32[8]) -> f32[1] {
  ROOT %copy.1 = f32[1]{0} copy(%p)
}

%loop (p: (s32[], s32[])) -> (s32[], s32[]) {
  %ag = (bf16[1]{0}, bf16[8]{0}) all-gather-start(%p), replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %agd = bf16[8]{0} all-gather-done(%ag)
}

ENTRY %main (p: bf16[4,2]) -> f32[1] {
  %while.1 = (s32[], bf16[4,2]) while(%t), condition=%condition, body=%body
  %while.2 = (s32[], s32[]) while(%t), condition=%open, body=%loop
  ROOT %conditional.1 = f32[1]{0} conditional(%i, %a, %b), branch_computations={%other, %side}
}
"""


def test_collectives_of_a_printed_program():
    """Oracle: by hand; seven eighths of what is gathered, twice that of a sum."""
    found = hlo.collectives(TEXT, open_loop=5.0, branch=0.5)
    gathered, summed, started, scattered = found
    assert gathered[:3] == ("all-gather", 2 * 64 * 7 / 8, 3) and gathered.asynchronous
    assert gathered.name == "a/all_gather"
    assert summed[:4] == ("all-reduce", 2 * 40 * 3 / 4, 3, "b/psum")
    assert started[:3] == ("all-gather", 2 * 8 * 7 / 8, 5) and started.asynchronous
    assert scattered[:3] == ("reduce-scatter", 4 * 7, 0.5)
    assert not summed.asynchronous and not scattered.asynchronous


def test_collectives_of_a_compiled_program():
    """Oracle: by hand; a scan of three over shards, on the eight devices here."""
    mesh = meshes.make_mesh({"fsdp": 8})

    def local(stack):
        def layer(x, part):
            return x @ meshes.Shard(part, ((-1, "fsdp"),), None).whole(), None

        return jax.lax.scan(layer, jnp.ones((2, 16)), stack)[0]

    spec = PartitionSpec(None, None, "fsdp")
    program = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(), check_vma=False
        )
    )
    like = jax.ShapeDtypeStruct(
        (3, 16, 16), jnp.float32, sharding=NamedSharding(mesh, spec)
    )
    found = hlo.collectives(program.lower(like).compile().as_text())
    assert {one.kind for one in found} == {"all-gather"}
    assert sum(one.total for one in found) == 3 * 4 * 16 * 16 * 7 / 8
    assert all("all_gather" in one.name for one in found)
