"""Frozen protocols on the tiny embedded model, and their tables."""

import json

import numpy as np
import pytest

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import evaluation, restore, variants
from flowgrpo_jax.data import prompt_sets
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.inference import protocols
from tests.test_evaluate import RECORDS, command


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "list.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in 2 * RECORDS))
    return path


def test_geneval_runs_from_the_command(
    prompts, weights_file, monkeypatch, tmp_path, capsys
):
    """Oracle: the means of what the reward says of all images, told by the JSON."""
    seen = []
    make = evaluation.make_eval_reward

    def watched(config, context):
        reward = make(config, context)

        def measured(images, of):
            seen.append((len(images), [prompt.text for prompt in of]))
            accuracy = np.float32([image.mean() > 0.5 for image in images])
            return reward(images, of) | {"accuracy": accuracy}

        return measured

    monkeypatch.setattr(evaluation, "make_eval_reward", watched)
    output = tmp_path / "scores.json"
    command(
        monkeypatch,
        "--config=configs/geneval.py",
        f"--config.model={weights_file}",
        "--config.microbatch=4",
        "--protocol=geneval",
        f"--prompts={prompts}",
        "--max_prompts=1",
        f"--output={output}",
    )
    texts = [record["prompt"] for record in RECORDS]
    assert seen == [(8, [texts[0]] * 4 + [texts[1]] * 4)]
    written = json.loads(output.read_text())
    assert written["protocol"] == "geneval" and not written["whole"]
    assert written["num_steps"] == written["config"]["sample"]["eval_num_steps"] == 40
    assert written["images_per_prompt"] == 4 and written["negative_prompt"] == ""
    assert written["guidance_scale"] == 1.5 and len(written["config_sha256"]) == 64
    scores = written["scores"]
    both = [scores["single_object_accuracy"], scores["counting_accuracy"]]
    assert scores["overall_accuracy"] == scores["images"] == np.mean(both)
    assert scores["prompts"] >= scores["images"]
    assert "| Overall | Single | Count |" in capsys.readouterr().out


def test_images_do_not_depend_on_how_many_are_made_at_once(
    prompts, weights_file, monkeypatch
):
    """Oracle: an invariance, to the last bit."""
    config = configs.make(model=weights_file, microbatch=4, eval__guidance_scale=1.0)
    config.sample.eval_num_steps = 2
    listed = assemble.load_prompt_set(str(prompts), "test")
    texts = [prompt.text for prompt in listed]
    pipeline, variables = restore.make_pipeline(config, restore.base(config), texts)

    def made():
        parts = list(protocols._images(pipeline, variables, len(listed), 3))
        numbers = np.concatenate([part[0] for part in parts])
        np.testing.assert_array_equal(numbers, np.arange(12))
        return np.concatenate([part[1] for part in parts])

    whole = made()
    monkeypatch.setattr(protocols, "_IMAGES_AT_ONCE", 9)  # three prompts, then one
    np.testing.assert_array_equal(whole, made())


def test_what_a_protocol_fixes():
    """Oracle: the papers' settings, by hand, whatever the config says."""
    config = configs.make(sample__eval_num_steps=7, eval__reward={"geneval": 1.0})
    geneval = variants.by_protocol(config, "geneval")
    assert geneval.sample.eval_num_steps == 40 and config.sample.eval_num_steps == 7
    official = prompt_sets.PROMPT_SETS[geneval.eval.prompts].generate("test")
    assert len(official) == 553
    assert protocols.PROTOCOLS["geneval"].images_per_prompt == 4
    ocr = variants.by_protocol(config, "ocr", "signs.txt")
    assert ocr.eval.reward.to_dict() == {"ocr": 1.0}
    assert ocr.eval.prompts == "signs.txt"
    drawbench = variants.by_protocol(config, "drawbench", "drawbench.txt")
    assert drawbench.eval.reward.to_dict() == {"geneval": 1.0}
    for name, line in [
        ("genevals", "--protocol: genevals: must be one of geneval, ocr"),
        ("drawbench", "--protocol: drawbench: needs its prompts"),
    ]:
        with pytest.raises(UserError, match=f"^{line}"):
            variants.by_protocol(config, name)


def test_tables_are_those_of_the_papers():
    """Oracle: the text, by hand; SD3.5-M as Flow-GRPO prints it."""
    tasks = {"single_object": 0.98, "two_object": 0.78, "counting": 0.5}
    tasks |= {"colors": 0.81, "position": 0.24, "color_attr": 0.52, "overall": 0.63}
    scores = {f"{task}_accuracy": value for task, value in tasks.items()}
    assert protocols.table(scores, "SD3.5-M").splitlines() == [
        "| model | Overall | Single | Two | Count | Colors | Position | Attr |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| SD3.5-M | 0.63 | 0.98 | 0.78 | 0.50 | 0.81 | 0.24 | 0.52 |",
    ]
    scores = {"reward_ocr": 0.594, "reward_ocr_exact": 0.25, "reward_avg": 0.594}
    assert protocols.table(scores, "m").splitlines()[::2] == [
        "| model | ocr | ocr_exact |",
        "| m | 0.59 | 0.25 |",
    ]
