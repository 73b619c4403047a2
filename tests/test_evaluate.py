"""Restoring weights, and the evaluate command on a base model and on a checkpoint."""

import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from flowgrpo_jax import assemble, cli, evaluate
from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import evaluation, restore
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.inference import evaluator
from flowgrpo_jax.rl import update as rl_update
from flowgrpo_jax.runtime.checkpoint import Checkpointer
from flowgrpo_jax.runtime.workdir import open_workdir
from flowgrpo_jax.worlds.sprites import model as sprites_model

ROOT = Path(__file__).parents[1]
RECORDS = [
    {"tag": "single_object", "include": [{"class": "circle", "count": 1}]}
    | {"prompt": "a photo of a circle"},
    {"tag": "counting", "include": [{"class": "ring", "count": 2}]}
    | {"exclude": [{"class": "ring", "count": 3}], "prompt": "a photo of two rings"},
]


def make_workdir(path, weights_file, prompts, **values):
    """The workdir of a run with checkpoints at 3 and 5, and its weights at each."""
    config = configs.make(
        model=weights_file,
        microbatch=4,
        sample__eval_num_steps=2,
        eval__guidance_scale=1.0,
        eval__prompts=str(prompts),
        eval__final_images_per_task=2,
        **values,
    )
    model, loaded = assemble.load_model(config)
    trainable = jax.device_get(assemble.trainable_part(config, model, loaded))
    saved = {}
    open_workdir(path, config.to_dict()).close()
    with Checkpointer(path / "checkpoints") as checkpoints:
        for step in (3, 5):
            learner = jax.tree.map(
                lambda x, s=step: x + np.float32(0.01 * s), trainable
            )
            saved[step] = rl_update.TrainState(
                trainable=learner,
                optimizer={"mu": trainable},
                ema=jax.tree.map(lambda x: x + np.float32(0.1), learner),
                updates=np.int32(step),
            )
            checkpoints.save(step, saved[step])
    return config, saved


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "held_out.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.fixture(scope="module")
def full(weights_file, prompts, tmp_path_factory):
    path = tmp_path_factory.mktemp("full")
    config, saved = make_workdir(path, weights_file, prompts, train__use_lora=False)
    return path, config, saved


def command(monkeypatch, *arguments, evaluated=None):
    """Run the command in this process, or with `evaluated` for the work itself."""
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    monkeypatch.chdir(ROOT)
    module = importlib.reload(evaluate)
    if evaluated is not None:
        monkeypatch.setattr(evaluation, "evaluate", evaluated)
    cli.parse(module.FLAGS)
    module.main()


def test_the_ema_of_the_newest_checkpoint_is_restored(full):
    """Oracle: the very arrays that were saved; the rest from the base model."""
    path, config, saved = full
    restored = restore.tuned(config, path)
    assert restored.checkpoint == 5
    jax.tree.map(
        np.testing.assert_array_equal,
        restored.variables["transformer"],
        saved[5].ema["transformer"],
    )
    base = restore.base(config).variables
    jax.tree.map(
        np.testing.assert_array_equal, restored.variables["text"], base["text"]
    )
    earlier = restore.tuned(config, path, 3).variables["transformer"]
    jax.tree.map(np.testing.assert_array_equal, earlier, saved[3].ema["transformer"])


def test_without_ema_the_learner_is_restored(full):
    """Oracle: the very arrays that were saved."""
    path, config, saved = full
    config = configs.from_json(config.to_dict())
    config.train.ema = False
    jax.tree.map(
        np.testing.assert_array_equal,
        restore.tuned(config, path).variables["transformer"],
        saved[5].trainable["transformer"],
    )


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("weights", ["ema", "learner"])
def test_either_weights_can_be_asked_for(full, ema, weights):
    """Oracle: the very arrays that were saved, whatever the run itself evaluates."""
    path, config, saved = full
    config = configs.from_json(config.to_dict())
    config.train.ema = ema
    restored = restore.tuned(config, path, 3, weights)
    wanted = {"ema": saved[3].ema, "learner": saved[3].trainable}[weights]
    jax.tree.map(
        np.testing.assert_array_equal,
        restored.variables["transformer"],
        wanted["transformer"],
    )
    name = {"ema": "the EMA", "learner": "the learner"}[weights]
    assert str(restored) == f"{name} after 3 iterations" and restored.differs
    assert str(restore.base(config)) == "the base model"


def test_an_adapter_is_restored_beside_the_base(weights_file, prompts, tmp_path):
    """Oracle: the very arrays that were saved; the transformer is that of the base."""
    config, saved = make_workdir(tmp_path, weights_file, prompts, train__lora_rank=2)
    variables = restore.tuned(config, tmp_path).variables
    jax.tree.map(np.testing.assert_array_equal, variables["lora"], saved[5].ema["lora"])
    base = restore.base(config).variables
    jax.tree.map(
        np.testing.assert_array_equal, variables["transformer"], base["transformer"]
    )


def test_a_checkpoint_is_scored(full, monkeypatch, capsys):
    """Oracle: the same evaluation of the weights as they were before they were saved."""
    path, config, saved = full
    command(monkeypatch, f"--workdir={path}", "--checkpoint=3")
    written = json.loads((path / "scores_000003.json").read_text())
    base = restore.base(config)
    variables = base.variables | saved[3].ema
    said = capsys.readouterr().out
    assert f"scores of the EMA after 3 iterations in {path}" in said
    expected = evaluation.evaluate(config, restore.Restored(base.model, variables))
    assert written["scores"].keys() == expected.keys()
    for name, value in expected.items():
        got = written["scores"][name]
        assert got == (value if np.isfinite(value) else None), name
    assert written["weights"] == "ema"
    assert written["checkpoint"] == 3 and written["config"]["microbatch"] == 4
    assert written["command"][1:] == [f"--workdir={path}", "--checkpoint=3"]
    assert written["versions"]["jax"] == jax.__version__
    assert evaluator.table(expected) in said


@pytest.mark.parametrize("source", ["workdir", "config"])
def test_the_base_model_is_evaluated(full, source, monkeypatch, tmp_path):
    """Oracle: the weights that reach the evaluation are those of the weights file."""
    path, config, _ = full
    output, seen = tmp_path / "new" / "base.json", []

    def evaluated(config, restored, rewards):
        assert rewards.made  # they were tried
        seen.append(restored.variables)
        return {"eval_overall_accuracy": 0.5, "eval_diversity": float("nan")}

    given = {
        "workdir": [f"--workdir={path}", "--base"],
        "config": ["--config=configs/geneval.py", f"--config.model={config.model}"],
    }[source]
    command(monkeypatch, *given, f"--output={output}", evaluated=evaluated)
    jax.tree.map(np.testing.assert_array_equal, *seen, restore.base(config).variables)
    written = json.loads(output.read_text())
    assert written["checkpoint"] is None
    assert written["scores"] == {"eval_overall_accuracy": 0.5, "eval_diversity": None}


def test_wrong_requests_are_one_line(full, monkeypatch, tmp_path):
    """Oracle: how the lines begin, by hand; what was there stays."""
    path, config, _ = full
    before = sorted(path.rglob("*"))
    config_flag = "--config=configs/geneval.py"
    for arguments, line in [
        ((), "--workdir: missing"),
        ((f"--workdir={path}", "--weights=ema", "--base"), "--weights: ema: the base"),
        ((config_flag, "--weights=ema"), "--weights: ema: the base model has none"),
        ((config_flag, "--model=x"), "--model: x: --config names one already"),
        ((f"--workdir={path}", "--model=sd3-medium"), "--model: sd3-medium: is not "),
        ((f"--workdir={path}", "--model=no.safetensors"), "model: "),
        ((f"--workdir={tmp_path}",), f"workdir: {tmp_path}: holds no config.json"),
        ((f"--workdir={path}", "--checkpoint=4"), "checkpoint: step 4: "),
        ((f"--workdir={path}", "--checkpoint=3", "--base"), "--checkpoint: 3: "),
        ((f"--workdir={path}", "--output=/proc/no/x.json"), "--output: /proc/no: "),
    ]:
        with pytest.raises(UserError) as caught:
            command(monkeypatch, *arguments)
        assert str(caught.value).startswith(line)
    assert sorted(path.rglob("*")) == before


def unfinished(path, weights_file, prompts, how):
    """A workdir that is not that of a run with checkpoints."""
    config = configs.make(model=weights_file, eval__prompts=str(prompts))
    open_workdir(path, config.to_dict()).close()
    if how == "empty checkpoints":
        (path / "checkpoints").mkdir()
    if how == "a save that was killed":
        (path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    if how == "result":
        (path / "weights.safetensors").write_text("there")
    if how == "adapter":
        (path / "pytorch_lora_weights.safetensors").write_text("there")
    if how == "checkpoints is a file":
        (path / "checkpoints").write_text("")
    broken = {
        "foreign": '{"model_type": "clip", "vocab_size": 4}',
        "wrong types": '{"train": 5}',
        "wrong values": '{"seed": "x"}',
        "a list": "[1]",
        "cut": '{"seed": 4',
        "deep": "[" * 100_000,
    }
    if how in broken:
        (path / "config.json").write_text(broken[how])


@pytest.mark.parametrize(
    "how, line",
    [
        ("no checkpoints", "holds no checkpoint: the run has not come to its first"),
        ("empty checkpoints", "holds no checkpoint: the run has not come to its first"),
        ("a save that was killed", "holds no checkpoint: the run has not come to its"),
        ("checkpoints is a file", "holds no checkpoint: the run has not come to its"),
        (
            "result",
            "holds no checkpoint: only its result, weights.safetensors, is there",
        ),
        ("adapter", "holds no checkpoint: only its result, pytorch_lora_weights.safe"),
        ("foreign", "config.json: not that of a run of this version: model_type: "),
        ("wrong types", "config.json: not that of a run of this version: "),
        ("wrong values", "config.json: not that of a run of this version: "),
        ("a list", "config.json: "),
        ("cut", "config.json: "),
        ("deep", "config.json: "),
    ],
)
def test_a_workdir_without_a_run_is_one_line(
    how, line, weights_file, prompts, tmp_path
):
    """Oracle: the line names the workdir; of commands that restore one all do."""
    unfinished(tmp_path, weights_file, prompts, how)
    with pytest.raises(UserError) as caught:
        config = restore.choose_config(None, str(tmp_path))
        restore.tuned(config, tmp_path)
    assert str(caught.value).startswith(f"workdir: {tmp_path}")
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_checkpoint_is_one_line(full, weights_file, prompts, tmp_path):
    """Oracle: the line names the folder, what is wrong and what to do."""
    config, _ = make_workdir(tmp_path, weights_file, prompts, train__use_lora=False)
    file = next((tmp_path / "checkpoints" / "5").rglob("ocdbt.process_0/d/*"))
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match=r"checkpoints/5: cannot be restored .*step 3"):
        restore.tuned(config, tmp_path)
    assert restore.tuned(config, tmp_path, 3).checkpoint == 3


@pytest.mark.parametrize("name", ["missing", "text", "other"])
def test_wrong_weights_are_one_line(name, tmp_path):
    """Oracle: how the lines begin, by hand."""
    from flowgrpo_jax.models.files import weights

    path = tmp_path / f"{name}.safetensors"
    if name == "text":
        path.write_text("no weights")
    if name == "other":
        weights.save(path, {"a": np.zeros(3)}, {})
    with pytest.raises(UserError) as caught:
        restore.base(configs.make(model=str(path)))
    start = "weights" if name == "text" else "model"
    assert str(caught.value).startswith(f"{start}: {path}: ")


def test_an_installation_without_weights_says_so(monkeypatch, tmp_path):
    """Oracle: the line, by hand."""
    missing = tmp_path / "model.safetensors"
    monkeypatch.setattr(sprites_model, "WEIGHTS", missing)
    with pytest.raises(UserError, match=f"^model: sprites: no weights at {missing}"):
        restore.base(configs.make())


def test_the_table_has_one_column_per_kind_and_run():
    """Oracle: the text, by hand; without guidance there is one column."""
    before = {"eval_overall_accuracy": 0.5, "eval_unguided_overall_accuracy": 0.25}
    assert evaluator.table(before).splitlines() == [
        "accuracy                   guided          unguided",
        "overall                     50.0%             25.0%",
    ]
    one = {"eval_overall_accuracy": 0.5}
    assert evaluator.table(one, one).splitlines() == [
        "accuracy            guided before      guided after",
        "overall                     50.0%             50.0%",
    ]
