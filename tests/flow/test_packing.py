"""Packing: every node once, after its parent, in full microbatches."""

import numpy as np
import pytest

from flowgrpo_jax.flow import packing, plan

G2RPO = plan.branches(16, tuple(range(8)), 12, granularities=(1, 2), whole_anchor=True)
CHAIN = plan.chains(4, (0, 1, 2, 3), ((0, 1, 2),) * 3)


def pack_of(made, jobs, microbatch):
    shape = packing.shape_of([made], jobs, microbatch)
    packer = packing.Packer(shape, microbatch)
    return packer.pack([packing.Job(n, made) for n in range(jobs)])


@pytest.mark.parametrize("made", [G2RPO, CHAIN])
@pytest.mark.parametrize("jobs, microbatch", [(1, 4), (3, 8)])
def test_every_node_once_and_after_its_parent(made, jobs, microbatch):
    """Oracle: an invariance; a step may only read rows of earlier rounds."""
    rows = packing.schedule([made] * jobs, microbatch)
    flat = np.concatenate([r[made.evaluated] for r in rows])
    assert len(set(flat.tolist())) == jobs * len(made.evaluated)
    for row in rows:
        for node in made.evaluated:
            parent = made.nodes[node].parent
            if parent >= 0:
                assert row[node] // microbatch > row[parent] // microbatch


@pytest.mark.parametrize("granularities", [(1, 2), (1, 2, 3)])
def test_g2rpo_fills_its_microbatches(granularities):
    """Oracle: issue's bar; at least 95% of the slots of microbatch 48 are used."""
    made = plan.branches(
        16, tuple(range(8)), 12, granularities=granularities, whole_anchor=True
    )
    jobs = packing.jobs_per_pack(made, 16, 48)
    tables = pack_of(made, jobs, 48)
    assert tables.used.sum() == jobs * len(made.evaluated)
    assert tables.used.sum() / (tables.rounds * 48) >= 0.95


def test_tables_of_a_chain():
    """Oracle: closed form; roots stand still, steps follow one another."""
    tables = pack_of(CHAIN, 2, 3)
    used = tables.used.reshape(-1) > 0
    start, stop = (
        getattr(tables.steps, k).reshape(-1)[used] for k in ("start", "stop")
    )
    own = np.flatnonzero(used)
    roots = tables.steps.parent.reshape(-1)[used] == own
    assert roots.sum() == 6
    np.testing.assert_array_equal(start[roots], stop[roots])
    np.testing.assert_array_equal(stop[~roots], start[~roots] + 1)
    np.testing.assert_array_equal(tables.steps.fresh.reshape(-1)[used], ~roots)
    # The last step is stochastic too: its noise is that of the leaves.
    np.testing.assert_array_equal(tables.leaf.fresh, 1)
    np.testing.assert_array_equal(tables.noise.counter[tables.leaf.noise], 4)
    # Three trained steps of three members of two prompts; each acts on the next row.
    assert tables.action.shape == (18, 1)
    acted = tables.steps.parent.reshape(-1)[tables.action[:, 0]]
    np.testing.assert_array_equal(acted, tables.state)


def test_noise_belongs_to_prompt_member_and_step():
    """Oracle: an invariance; no two rows of a pack draw the same noise."""
    tables = pack_of(CHAIN, 2, 3)
    noise = tables.noise
    names = list(zip(noise.prompt, noise.member, noise.counter, strict=True))
    assert len(names) == len(set(names)) == 2 * 3 * 5


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_results_come_back_in_the_order_of_jobs(devices):
    """Oracle: an invariance; rows marked with their prompt land at their job."""
    jobs = [packing.Job(n, CHAIN) for n in range(6)]
    shape = packing.shape_of([CHAIN], 2, 4)
    packed = packing.pack_all(packing.Packer(shape, 4), jobs, 2, devices)
    assert len(packed.tables.rounds) % devices == 0
    leaves = packed.tables.leaf.noise
    leaf_prompt = np.take_along_axis(packed.tables.noise.prompt, leaves, 1)
    np.testing.assert_array_equal(
        packing.collect(leaf_prompt, packed), np.repeat(np.arange(6), 3).reshape(6, 3)
    )
    idle = packed.tables.rounds == 0
    assert idle.sum() == len(idle) - 3


def test_bound_on_rounds_holds_for_every_mixture():
    """Oracle: the bound of list scheduling, tried on random mixtures of plans."""
    kinds = [plan.branches(10, (k,), 5) for k in range(1, 6)]
    shape = packing.shape_of(kinds, 7, 4)
    packer = packing.Packer(shape, 4)
    rng = np.random.default_rng(0)
    for _ in range(30):
        jobs = [packing.Job(n, kinds[k]) for n, k in enumerate(rng.integers(5, size=7))]
        assert packer.pack(jobs).rounds <= shape.rounds


def test_second_order_steps_know_their_grandparent():
    """Oracle: closed form; the step after the window looks back over the action."""
    made = plan.chains(8, (0,), ((0,),), finish=(4, 6, 8))
    tables = pack_of(made, 1, 1)
    # Rows: root, the action's end at 1, then 4 and 6; 8 is clean.
    np.testing.assert_array_equal(tables.steps.stop[: tables.rounds, 0], [0, 1, 4, 6])
    np.testing.assert_array_equal(tables.steps.before[2:4, 0], [0, 1])
    np.testing.assert_array_equal(tables.steps.earlier[2:4, 0], [0, 1])
    np.testing.assert_array_equal(
        [tables.leaf.before[0], tables.leaf.earlier[0]], [2, 4]
    )


def test_parts_of_a_rollout():
    """Oracle: the whole; every job's rows are in the part that holds the job, in order,
    and parts of a device follow each other as its packs do."""
    one = plan.chains(4, (0, 1), ((0,), (1,)))
    jobs = [packing.Job(prompt, one) for prompt in range(7)]  # the last pack is empty
    packer = packing.Packer(packing.shape_of([one], 1, 2), 2)
    whole = packing.pack_all(packer, jobs, 1, devices=2)
    parts = packing.split(whole, 2, devices=2)
    prompts = [packing.collect(part.tables.prompt[:, 0], part) for part in parts]
    assert np.concatenate(prompts)[:, 0].tolist() == list(range(7))
    for device in range(2):
        mine = slice(2 * device, 2 * device + 2)
        joined = np.concatenate([part.tables.noise.prompt[mine] for part in parts])
        each = slice(4 * device, 4 * device + 4)
        np.testing.assert_array_equal(joined, whole.tables.noise.prompt[each])
    with pytest.raises(ValueError, match="^4 packs of a device in 3 equal parts"):
        packing.split(whole, 3, devices=2)
