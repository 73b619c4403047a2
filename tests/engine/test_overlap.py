"""Rewards beside the rollout, and rewards that fail: what it means for a run."""

import json
import threading
import time

import jax
import numpy as np
import pytest

from flowgrpo_jax import train as trainer
from flowgrpo_jax.assemble import run as assembled
from flowgrpo_jax.assemble import specs
from flowgrpo_jax.config import checks
from flowgrpo_jax.engine import credit
from flowgrpo_jax.engine.planner import Planner
from flowgrpo_jax.errors import UserError
from tests import toy
from tests.tiny_run import reward_spread, rows, tiny_config, use

PROMPTS, GROUP = 4, 4


def config_of(weights_file, **values):
    return tiny_config(
        weights_file,
        **{"prompts_per_iteration": PROMPTS, "num_iterations": 3, "eval__every": 0}
        | values,
    )


def fails(when, scores=reward_spread):
    """A reward that raises in the rollout's calls of which `when` holds."""
    calls = []

    def reward(images, prompts):
        if len({prompt.text for prompt in prompts}) * GROUP == len(prompts):
            calls.append(len(prompts))
            if when(len(calls)):
                raise ConnectionError("the server is gone")
        return scores(images, prompts)

    return reward


@pytest.fixture(scope="module")
def undisturbed(weights_file, tmp_path_factory):
    """Rows of a run whose rewards come after the whole rollout."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        use(patch, reward_spread)
        assert trainer.train(config_of(weights_file), workdir)
    return rows(workdir)


def test_a_failed_run_goes_on_with_the_same_rows(
    weights_file, undisturbed, tmp_path, monkeypatch
):
    """Oracle: an invariance; two batches, odd timing, and a failure change nothing."""
    config = config_of(weights_file, reward_batches=2, checkpoint__every=50)
    failing = fails(lambda call: call == 4)  # the second batch of iteration 1

    def slowly(images, prompts):
        time.sleep(0.1 * (prompts[0].index % 2))
        return failing(images, prompts)

    use(monkeypatch, slowly)
    with pytest.raises(
        UserError,
        match="^reward.geneval: ConnectionError: the server is gone: the run is saved "
        "at iteration 1, and the same command goes on from there$",
    ):
        trainer.train(config, tmp_path)
    assert [row["iteration"] for row in rows(tmp_path)] == [0, 0]
    assert trainer.train(config, tmp_path)
    assert json.dumps(rows(tmp_path)) == json.dumps(undisturbed)


def toy_run(monkeypatch, scores, **values):
    """A run of 4 prompts in 2 batches, each a pack."""
    return toy.make_run(
        monkeypatch,
        "flow_grpo",
        scores,
        prompts_per_iteration=PROMPTS,
        group_size=GROUP,
        updates_per_iteration=2,
        microbatch=GROUP,
        train__learning_rate=0.03,
        **{"reward_batches": 2} | values,
    )


@pytest.mark.parametrize("recipe", ["g2rpo", "diffusion_nft"])
def test_batches_change_nothing(monkeypatch, recipe):
    """Oracle: an invariance, for transitions and for samples; metrics are equal."""
    made = []
    for batches in (1, 2, 4):
        run = toy.make_run(
            monkeypatch,
            recipe,
            prompts_per_iteration=PROMPTS,
            updates_per_iteration=1,
            microbatch=12,
            reward_batches=batches,
        )
        _, metrics = run.step(run.initial_state(), 0)
        made.append({k: v for k, v in metrics.items() if not k.startswith("time/")})
    assert made[0] == made[1] == made[2]


def test_one_batch_is_scored_while_the_next_is_sampled(monkeypatch):
    """Oracle: the order of events; no score is ready before the second batch begins."""
    second_begins = threading.Event()

    def waits(images, prompts):
        assert second_begins.wait(30)
        return toy.reward(images, prompts)

    run = toy_run(monkeypatch, waits)
    rollout, begun = run.work.rollout, []

    def counted(*arguments):
        begun.append(0)
        if len(begun) == 2:
            second_begins.set()
        return rollout(*arguments)

    monkeypatch.setattr(run.work, "rollout", counted)
    run.step(run.initial_state(), 0)
    assert len(begun) == 2


def test_skipping_leaves_failed_groups_out(monkeypatch, capfd):
    """Oracle: by hand; one batch of two fails, then both: then nothing is learned."""
    failing = fails(lambda call: call == 2 or call > 4, toy.reward)
    run = toy_run(monkeypatch, failing, reward_failure="skip")
    state, half = run.step(run.initial_state(), 0)
    assert half["reward_failed"] == 0.5 and half["trained_prompt_num_batch"] == 2
    assert np.isfinite(half["reward_geneval"]) and np.isfinite(half["policy_loss"])
    state, whole = run.step(state, 1)
    assert whole["reward_failed"] == 0.0 and whole["trained_prompt_num_batch"] == 4

    before = jax.device_get(state)
    state, none = run.step(state, 2)
    assert none["reward_failed"] == 1.0 and "policy_loss" not in none
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))
    run.step(state, 3)
    with pytest.raises(UserError, match="^reward_failure: skip: 3 iterations in a row"):
        run.step(state, 4)
    assert "skipped: reward.geneval: ConnectionError" in capfd.readouterr().err


@pytest.mark.parametrize("together", ["sample", "pair", "group"])
def test_skipped_samples_have_no_weight(weights_file, together):
    """Oracle: by hand; the entries of the one prompt without rewards."""
    config = config_of(weights_file, recipe="diffusion_nft", group_size=GROUP)
    planner = Planner(specs.plan_spec(config), devices=2)
    jobs = planner.jobs(0)
    leaves = credit.leaves_of(jobs, "prompt")
    scores = np.arange(16.0)
    scores[5] = np.nan  # prompt 1
    leaves = credit.scored(leaves, scores)
    advantages, stats = credit.of_samples(
        specs.advantage_spec(config), {"geneval": scores}, leaves
    )
    assert not advantages[4:8].any() and advantages[leaves.credited].all()
    assert stats["trained_prompt_num_batch"] == 3
    rewards = np.where(leaves.credited, scores, np.nan).reshape(PROMPTS, GROUP)
    update_batch = credit.batch_of_samples(
        specs.update_spec(config),
        planner.pack(jobs),
        rewards,
        advantages.reshape(4, 4),
        together,
        2,
    )
    taught = update_batch.weight.any(axis=-1)
    assert set(update_batch.prompt[taught]) == {0, 2, 3}
    assert np.isfinite(update_batch.reward).all()


def test_wrong_values_are_named(weights_file):
    """Oracle: the lines, by hand; two packs on each of two devices."""
    with pytest.raises(UserError, match="^reward_failure: go: must be one of stop, s"):
        checks.check(config_of(weights_file, reward_failure="go"))
    with pytest.raises(
        UserError, match="^reward_batches: 3: must divide the 2 packs .*one of 1, 2$"
    ):
        assembled.Run(config_of(weights_file, reward_batches=3))
