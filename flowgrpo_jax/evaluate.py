"""Evaluates a checkpoint or a base model on the held-out prompts: a table and JSON.

python -m flowgrpo_jax.evaluate --workdir=DIR                    the newest checkpoint
python -m flowgrpo_jax.evaluate --workdir=DIR --base             what the run began with
python -m flowgrpo_jax.evaluate --config=configs/geneval.py      a base model
python -m flowgrpo_jax.evaluate --workdir=DIR --protocol=geneval
python -m flowgrpo_jax.evaluate --workdir=DIR --protocol=drawbench --prompts=FILE.txt

A protocol measures as papers do (inference/protocols.py); without one the scores are those of the
run's own final evaluation.
"""

import hashlib
import json
import math
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from flowgrpo_jax import cli
from flowgrpo_jax.errors import UserError

FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Evaluate the base model of this config.", FLAGS
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Evaluate the run in this folder.", FLAGS
)
_CHECKPOINT = flags.DEFINE_integer(
    "checkpoint",
    None,
    "Which checkpoint of --workdir, by its finished iterations; by default the newest.",
    flag_values=FLAGS,
)
_WEIGHTS = flags.DEFINE_enum(
    "weights",
    None,
    ["ema", "learner"],
    "Which weights of --workdir; by default those that the run evaluates.",
    flag_values=FLAGS,
)
_MODEL = flags.DEFINE_string(
    "model", None, "Where the run's base model is now, if it has been moved.", FLAGS
)
_BASE = flags.DEFINE_bool("base", False, "Evaluate the base model of --workdir.", FLAGS)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "JSON file to write; by default scores_<checkpoint or base>.json in --workdir.",
    FLAGS,
)
_PROTOCOL = flags.DEFINE_string(
    "protocol",
    None,
    "Measure as papers do: geneval, ocr, pickscore or drawbench.",
    FLAGS,
)
_PROMPTS = flags.DEFINE_string(
    "prompts",
    None,
    "Prompts for --protocol: a .txt or .jsonl file or a prompt set.",
    FLAGS,
)
_MAX_PROMPTS = flags.DEFINE_integer(
    "max_prompts",
    None,
    "For a trial of --protocol: the most prompts of each task.",
    lower_bound=1,
    flag_values=FLAGS,
)


def main() -> None:
    for flag in (_CHECKPOINT, _WEIGHTS):
        if flag.value is not None and (_BASE.value or _WORKDIR.value is None):
            raise UserError(
                f"--{flag.name}: {flag.value}: the base model has none: give "
                "--workdir, without --base"
            )
    if _MODEL.value is not None and _CONFIG.value is not None:
        raise UserError(f"--model: {_MODEL.value}: --config names one already")
    protocol = _PROTOCOL.value
    if protocol is None and (_PROMPTS.value or _MAX_PROMPTS.value):
        raise UserError("--prompts, --max_prompts: need a protocol: give --protocol")
    from flowgrpo_jax import assemble
    from flowgrpo_jax.assemble import evaluation, restore, sizes, variants
    from flowgrpo_jax.inference import evaluator, protocols

    workdir = _WORKDIR.value
    config = restore.choose_config(_CONFIG.value, workdir, _MODEL.value)
    if protocol is not None:
        config = variants.by_protocol(config, protocol, _PROMPTS.value)
    if _OUTPUT.value:  # fail before the work, not after it
        cli.writable_folder(Path(_OUTPUT.value).parent, "--output")
    rewards = assemble.try_rewards(config, False, monitored=protocol is None)
    asked = sizes.of_evaluation(config)
    if workdir is None or _BASE.value:
        restored = restore.base(config, asked)
    else:
        restored = restore.tuned(
            config, workdir, _CHECKPOINT.value, _WEIGHTS.value, asked
        )
    restored.warn()
    other = restored.weights if _WEIGHTS.value else ""
    output = _OUTPUT.value or default_output(
        workdir, restored.checkpoint, "_".join(filter(None, (other, protocol)))
    )
    if protocol is None:
        scores, how = evaluation.evaluate(config, restored, rewards), {}
        print(evaluator.table(scores))
    else:
        most = _MAX_PROMPTS.value
        scores = evaluation.measure(config, restored, protocol, most, rewards)
        how = record(config, protocol, most)
        print(protocols.table(scores, Path(workdir or config.model).name))
    write(output, config, restored, scores, how)
    print(f"scores of {restored} in {output}")


def record(config: ConfigDict, name: str, max_prompts: int | None) -> dict[str, Any]:
    """What the JSON says about how a protocol's scores were measured."""
    from flowgrpo_jax.inference import protocols

    return {
        "protocol": name,
        "prompts": config.eval.prompts,
        "whole": max_prompts is None,  # else no number to compare
        "images_per_prompt": protocols.PROTOCOLS[name].images_per_prompt,
        "num_steps": config.sample.eval_num_steps,
        "guidance_scale": config.eval.guidance_scale,
        "negative_prompt": "",
    }


def default_output(
    workdir: str | None, checkpoint: int | None, how: str | None = None
) -> Path:
    """scores_base.json, scores_000400.json or, by a protocol, scores_base_geneval.json.

    In the workdir if there is one. `how`: what else the scores depend on.
    """
    name = "base" if checkpoint is None else f"{checkpoint:06d}"
    name += f"_{how}" if how else ""
    return Path(workdir or ".") / f"scores_{name}.json"


def write(
    path: str | Path,
    config: ConfigDict,
    restored: Any,
    scores: Mapping[str, float],
    how: Mapping[str, Any] | None = None,
) -> None:
    """The scores of a `restore.Restored` and all that is needed to get them again.

    As JSON (NaN is null).
    """
    from flowgrpo_jax.runtime.environment import versions
    from flowgrpo_jax.runtime.workdir import atomic_write

    values = config.to_dict()
    text = json.dumps(values, sort_keys=True)
    record = {
        **(how or {}),
        "checkpoint": restored.checkpoint,
        "weights": restored.weights,
        "scores": {k: v if math.isfinite(v) else None for k, v in scores.items()},
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "config": values,
        "command": sys.argv,
        "versions": versions() | {"python": platform.python_version()},
    }
    atomic_write(path, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main, FLAGS)
