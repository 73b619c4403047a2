"""The search for what fits and costs least: by formula, and what compilers correct."""

import pytest

from flowgrpo_jax import config as configs
from flowgrpo_jax import estimate
from flowgrpo_jax.assemble import tuning as choices
from flowgrpo_jax.cost import flops, tuning
from flowgrpo_jax.cost.tuning import Choice
from flowgrpo_jax.errors import UserError


@pytest.fixture(scope="module")
def config():
    return configs.make("model=sd3.5-medium", prompts_per_iteration=4, group_size=4)


@pytest.fixture(scope="module")
def found(config):
    return choices.candidates(config, "v5e:2x1")


def test_all_that_is_found_fits_the_cheapest_first(found):
    """Oracle: the contract; and the search has not only one place to go."""
    assert all(one.bytes <= flops.CHIPS["v5e"].memory for one in found)
    seconds = [one.seconds for one in found]
    assert seconds == sorted(seconds)
    assert {one.choice.fsdp for one in found} == {1, 2}
    assert len({one.choice.remat for one in found}) > 2


def test_what_is_found_is_what_its_flags_would_make(config, found):
    """Oracle: `carried_out` of a run with these flags, priced by itself."""
    best = found[0]
    chosen = choices.with_choice(config, best.choice)
    work, chip, _ = estimate.workload(chosen, "H100:2")  # no compiler is asked
    paths = estimate.topology.paths("v5e:2x1", work.mesh)
    costs = estimate.budget.of(work)
    again = tuning.carried_out(work, costs, flops.CHIPS["v5e"], paths)
    assert again.choice == best.choice
    assert again.seconds == pytest.approx(best.seconds, rel=1e-12)
    assert again.bytes == pytest.approx(best.bytes, rel=1e-12)


def test_more_to_compute_or_to_send_costs_more(found):
    """Oracle: by hand; `full` computes again what `dense` keeps; shards are sent."""
    by = {one.choice[:3]: one.seconds for one in found}
    assert by[1, "full", 1] > by[1, "dense", 1]
    assert by[1, "full", 2] > by[1, "full", 1]
    assert by[2, "full", 1] < by[1, "full", 1]  # adaLN is read half as often


def test_microbatches_that_are_tried():
    """Oracle: by hand; divisors of the group, and powers of two."""
    assert tuning.microbatches(24, 144) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64]
    assert tuning.microbatches(24, 7) == [1, 2, 3, 4, 6]


def test_flags_are_one_line_to_paste():
    """Oracle: by hand."""
    assert Choice(4, "dense", 8, 6).flags == (
        "--config.microbatch=4 --config.remat=dense --config.mesh.data=-1 "
        "--config.mesh.fsdp=8 --config.reward_batches=6"
    )


def compiler(monkeypatch, sizes):
    """Compilers that tell these sizes, by microbatch and remat; what they were asked."""
    asked = []
    monkeypatch.setattr(estimate, "workload", lambda config, name: (config, "", None))

    def programs(config, costs, names):
        asked.append((config.microbatch, config.remat))
        for name in names:
            yield estimate.Program(name, sizes(*asked[-1]), 1.0)

    monkeypatch.setattr(estimate, "compile_programs", programs)
    return asked


def test_the_compiler_corrects_the_formula(monkeypatch, config, found):
    """Oracle: by hand; no `dense` fits it, so the next of another `remat` is asked."""
    big, fits = 99e9, 1e9
    first = found[0].choice.remat
    asked = compiler(monkeypatch, lambda _, remat: big if remat == first else fits)
    best = estimate.confirmed(config, "v5e:2x1", found, 16e9)
    others = [one for one in found if one.choice.remat != first]
    assert best == others[0] and len(asked) == 2


def test_nothing_that_the_compiler_takes(monkeypatch, config, found):
    """Oracle: the line; a few are asked and no more."""
    asked = compiler(monkeypatch, lambda *_: 17e9)
    with pytest.raises(UserError, match="^--tune: v5e:2x1: none of the .* compiler: "):
        estimate.confirmed(config, "v5e:2x1", found, 16e9)
    assert 1 < len(asked) <= 4


def test_nothing_that_fits():
    """Oracle: the line."""
    config = configs.make(
        "model=flux.1-dev", train__use_lora=False, prompts_per_iteration=4, group_size=2
    )
    with pytest.raises(UserError, match="^--tune: v5e:1x1: nothing fits by the form"):
        choices.candidates(config, "v5e:1x1")
