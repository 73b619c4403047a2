"""Whole runs of a tiny model: resume, compilations, pretraining, the report."""

import dataclasses
import functools
import itertools
import json
import signal
import time
import types

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax import train as trainer
from flowgrpo_jax.assemble import base_weights
from flowgrpo_jax.assemble import run as assembled
from flowgrpo_jax.engine.finite import check_finite
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.inference import evaluator
from flowgrpo_jax.rewards import scoring
from flowgrpo_jax.rl import measurements
from flowgrpo_jax.rl import update as rl_update
from flowgrpo_jax.runtime import metric_meanings, samples
from flowgrpo_jax.runtime.checkpoint import Checkpointer, Schedule
from flowgrpo_jax.runtime.metrics import read_metrics
from flowgrpo_jax.worlds.sprites import model as sprites_model
from tests.tiny import SIZE, tiny_model
from tests.tiny_run import reward_spread, rows, tiny_config, use


@pytest.fixture(autouse=True)
def bright_is_good(monkeypatch):
    use(monkeypatch, reward_spread)


@pytest.fixture(scope="module")
def undisturbed(weights_file, tmp_path_factory):
    """A finished run, and the compilations of each of its iterations."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    compiled = []
    step = assembled.Run.step

    def counted(self, state, iteration):
        compiled.append(0)
        return step(self, state, iteration)

    def listen(event, duration, **_):
        if compiled and event == "/jax/core/compile/backend_compile_duration":
            compiled[-1] += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembled.Run, "step", counted)
        use(patch, reward_spread)
        jax.monitoring.register_event_duration_secs_listener(listen)
        assert trainer.train(tiny_config(weights_file), workdir)
    return workdir, compiled


def test_nothing_compiles_after_the_first_iterations(undisturbed):
    """Oracle: a count. The whole loop also runs under the ban on implicit transfers."""
    _, compiled = undisturbed
    assert compiled[0] > 0  # the listener hears
    assert compiled[2:] == [0, 0]


def test_rows_are_complete(undisturbed):
    """Oracle: counting; one train row per iteration, evaluations at 0, 2 and 4."""
    workdir, _ = undisturbed
    written = [(row["iteration"], row["kind"]) for row in read_metrics(workdir)]
    assert written == [
        (0, "eval"),
        (0, "train"),
        (1, "train"),
        (2, "eval"),
        (2, "train"),
        (3, "train"),
        (4, "eval"),
    ]
    first = read_metrics(workdir)[1]
    assert first["ratio_gap"] == 0.0 and first["kl_loss"] >= 0.0
    assert first["actual_batch_size"] > 0
    assert (workdir / "report.html").stat().st_size > 10_000


def test_every_metric_of_a_run_has_a_meaning(undisturbed):
    """Oracle: the rows of a run; the page and the boards say what each of them is."""
    names = {name for row in read_metrics(undisturbed[0]) for name in row}
    for name in names - {"iteration", "kind"}:
        meaning = metric_meanings.of(name)
        assert meaning.title and (meaning.means or meaning.unit == "s"), name


def test_the_page_has_pictures_with_words(undisturbed):
    """Oracle: what the run asked for, and the groups of its last iteration."""
    folder = undisturbed[0] / "samples"
    told = samples.read_words(folder, samples.name_of(4))
    assert told["samples"][0]["scores"].keys() >= {"geneval", "avg"}
    page = (undisturbed[0] / "report.html").read_text()
    assert told["samples"][0]["prompt"] in page
    groups = samples.read_words(folder, samples.GROUPS)
    best, worst = groups["samples"][:2]
    assert groups["iteration"] == 3 and best["prompt"] == worst["prompt"]
    assert best["scores"]["geneval"] > worst["scores"]["geneval"]
    assert best["scores"]["advantage"] > 0 > worst["scores"]["advantage"]
    assert "Groups of iteration 3" in page


def test_learning_raises_the_reward(undisturbed):
    """Oracle: the weights move, and only those that are trained."""
    workdir, _ = undisturbed
    after = load_file(workdir / "weights.safetensors")
    _, before = tiny_model()
    before = traverse_util.flatten_dict(before, sep="/")
    moved = {
        name for name, leaf in before.items() if (after[name] != np.float16(leaf)).any()
    }
    assert "transformer/proj_out/kernel" in moved
    assert all("attn" in name or "proj_out" in name for name in moved)


def test_parameters_that_match_nothing_are_named(weights_file):
    """Oracle: the line, by hand."""
    config = tiny_config(weights_file)
    config.train.parameters = "mlp"
    model, loaded = assemble.load_model(config)
    with pytest.raises(UserError, match="^train.parameters: mlp: matches no parameter"):
        assemble.trainable_part(config, model, loaded)


def _signal_in(patch, owner, name, when):
    """SIGTERM just before a call of `owner.name`, the first one that `when` holds for."""
    call = getattr(owner, name)
    sent = []

    def interrupted(self, *arguments):
        if not sent and when(self, *arguments):
            sent.append(signal.raise_signal(signal.SIGTERM))
            time.sleep(0.2)  # the thread that reads signals takes note
        return call(self, *arguments)

    patch.setattr(owner, name, interrupted)


def _at_2(self, state, iteration):
    return iteration == 2


def _second(self, *_):
    self.calls = getattr(self, "calls", 0) + 1
    return self.calls == 2


# Where the signal comes, and the rows that are there afterwards.
MOMENTS = {
    "between evaluation and step": (assembled.Run, "step", _at_2, (2, "eval")),
    "in an evaluation": (evaluator.Evaluator, "__call__", _second, (1, "train")),
    "in a reward": (scoring.Scorer, "finish", lambda self, *_: True, (1, "train")),
    "in the last save": (Checkpointer, "save", lambda self, i, _: i == 4, (3, "train")),
    "at the very end": (Checkpointer, "close", lambda self: True, (4, "eval")),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stopped_run_goes_on_as_if_nothing_was(
    moment, weights_file, undisturbed, tmp_path, monkeypatch
):
    """Oracle: an invariance; rows and weights equal those of the undisturbed run."""
    owner, name, when, last = MOMENTS[moment]
    if moment == "in a reward":  # of the third rollout; evaluations have theirs

        def when(self, batches, *_):
            self.calls = getattr(self, "calls", 0) + (sum(b.size for b in batches) == 8)
            return self.calls == 3

        last = (2, "eval")
    with monkeypatch.context() as patch:
        _signal_in(patch, owner, name, when)
        assert not trainer.train(tiny_config(weights_file), tmp_path)
    assert (rows(tmp_path)[-1]["iteration"], rows(tmp_path)[-1]["kind"]) == last
    assert trainer.train(tiny_config(weights_file), tmp_path)
    assert json.dumps(rows(tmp_path)) == json.dumps(rows(undisturbed[0]))
    ours, theirs = (
        load_file(workdir / "weights.safetensors")
        for workdir in (tmp_path, undisturbed[0])
    )
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


def test_checkpoints_by_minutes_change_nothing(
    weights_file, undisturbed, tmp_path, monkeypatch
):
    """Oracle: an invariance; and the steps on disk, an hour passing between two looks."""
    hours = itertools.count()
    late = functools.partial(Schedule, clock=lambda: 3600.0 * next(hours))
    monkeypatch.setattr(trainer, "Schedule", late)
    config = tiny_config(weights_file, checkpoint__every=100, checkpoint__keep=9)
    assert trainer.train(config, tmp_path)
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["1", "2", "3", "4"]
    assert json.dumps(rows(tmp_path)) == json.dumps(rows(undisturbed[0]))


def test_updates_without_anything_to_learn_from_do_not_count():
    """Oracle: means by hand; gaps are those of the first update."""
    info = {"ratio": np.float32([0, 1, 2]), "ratio_gap": np.float32([3, 4, 5])}
    weight = np.zeros((3, 2, 4, 1))
    assert measurements.of_iteration(info, weight) == {"ratio_gap": 3.0}
    weight[1:, 0, 2] = 1
    assert measurements.of_iteration(info, weight) == {"ratio": 1.5, "ratio_gap": 3.0}
    assert measurements.of_iteration(info, weight + 1) == {
        "ratio": 1.0,
        "ratio_gap": 3.0,
    }


def test_pretraining_is_the_same_loop(tmp_path, monkeypatch):
    """Oracle: the flow-matching loss falls."""

    def tiny(**given):
        return dataclasses.replace(SIZE, **given)

    monkeypatch.setattr(sprites_model, "Size", tiny)
    config = configs.make(
        recipe="pretrain",
        num_iterations=60,
        prompts_per_iteration=16,
        group_size=1,
        mesh={"data": 2},
        sample__eval_num_steps=2,
        eval__guidance_scale=1.0,
        eval__images_per_task=1,
        eval__final_images_per_task=1,
        eval__every=0,
        train__learning_rate=2e-3,
        log__tensorboard=False,
    )
    assert trainer.train(config, tmp_path)
    losses = [row["loss"] for row in read_metrics(tmp_path) if row["kind"] == "train"]
    # Medians: a sample near sigma 0 weighs up to 1 / MIN_SIGMA^2.
    assert np.median(losses[-20:]) < 0.8 * np.median(losses[:10])


def test_a_reward_that_is_no_number_stops_the_run(weights_file, tmp_path, monkeypatch):
    """Oracle: one line that names it; what was done until then is saved."""
    calls = []

    def broken(images, prompts):
        measured = reward_spread(images, prompts)
        if len(prompts) == 8:  # a rollout, not an evaluation
            calls.append(0)
        return measured | (
            {"geneval": measured["geneval"] * np.nan} if len(calls) > 3 else {}
        )

    use(monkeypatch, broken)
    with pytest.raises(UserError, match="^reward.geneval: nan of sample 0: must be"):
        trainer.train(tiny_config(weights_file), tmp_path)
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["2", "3"]
    assert rows(tmp_path)[-1]["iteration"] == 2


def test_a_diverged_run_is_one_line():
    """Oracle: the line names key, value and remedy, by hand."""
    check_finite(0.5, 7, {"grad_norm": 1.0})
    with pytest.raises(UserError) as caught:
        check_finite(0.5, 7, {"grad_norm": np.inf})
    assert str(caught.value).startswith(
        "train.learning_rate: 0.5: grad_norm not finite at iteration 7: take a lower"
    )


@pytest.mark.parametrize("ema", [True, False])
def test_a_result_that_is_the_base_model_is_said_to_be(ema, capsys):
    """Oracle: by hand; of a state only what the run leaves as its result counts."""
    base = {"transformer": {"out": np.ones(2)}}
    moved = {"transformer": {"out": np.full(2, 1.5)}}
    run = types.SimpleNamespace(
        config=configs.make(train__ema=ema, num_iterations=3),
        _began=base_weights.mark(base),
    )
    run._evaluated = functools.partial(assembled.Run._evaluated, run)
    for result, other in ((base, moved), (moved, base)):
        learner, average = (other, result) if ema else (result, other)
        state = rl_update.TrainState(learner, {}, average, 0)
        assembled.Run.warn_if_unmoved(run, state)
        name = "the EMA" if ema else "the learner"
        line = f"warning: nothing differs from the base model: {name} after 3 iteration"
        told = capsys.readouterr().err
        assert told.startswith(line) if result is base else not told


def test_a_run_that_cannot_be_leaves_no_workdir(tmp_path):
    """Oracle: the file system: a corrected command is not refused afterwards."""
    for wrong in ({"model": "no.safetensors"}, {"group_size": 1}, {"reward": {"a": 1}}):
        with pytest.raises(UserError, match=f"^{next(iter(wrong))}: "):
            trainer.train(configs.make(**wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()
