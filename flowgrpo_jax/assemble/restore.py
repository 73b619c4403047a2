"""The weights of the base model or of a workdir's checkpoint, ready to make images."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import base_weights, prompt_checks
from flowgrpo_jax.assemble import sizes as sized
from flowgrpo_jax.assemble.model import load_model, starting_model, trainable_part
from flowgrpo_jax.assemble.sampler import make_eval_sampler
from flowgrpo_jax.assemble.specs import image_spec
from flowgrpo_jax.assemble.text import make_text_table
from flowgrpo_jax.config import checks
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.engine.text_table import TextTable
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.inference.pipeline import Pipeline, Sized
from flowgrpo_jax.models.files import lora_files
from flowgrpo_jax.models.flow_model import FlowModel, Variables, overlay
from flowgrpo_jax.rewards import registry
from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.runtime.checkpoint import Checkpointer
from flowgrpo_jax.runtime.resolution import Size
from flowgrpo_jax.runtime.workdir import read_config

# Field of a checkpoint's state -> what --weights calls it.
_PARTS = {"ema": "ema", "learner": "trainable"}
# What a finished run leaves beside its checkpoints; see assemble.save_result.
_RESULTS = ("weights.safetensors", lora_files.DIFFUSERS_FILE, "transformer")


@dataclasses.dataclass(frozen=True)
class Restored:
    """A model, its weights on the host, and the checkpoint that they are from."""

    model: FlowModel
    variables: Variables
    checkpoint: int | None = None  # finished iterations; None for the base model
    weights: str = "base"  # or ema, learner
    differs: bool = False  # in anything from the base model

    def __str__(self) -> str:
        if self.weights == "base":
            return "the base model"
        return f"{base_weights.NAMES[self.weights]} after {self.checkpoint} iterations"

    def warn(self) -> None:
        """A line to stderr where a tuned model is the base model."""
        if self.weights != "base" and not self.differs:
            told = base_weights.unmoved(self.weights, self.checkpoint)
            print(f"warning: {told}", file=sys.stderr)


def choose_config(
    config: ml_collections.ConfigDict | None,
    workdir: str | None,
    model: str | None = None,
) -> ml_collections.ConfigDict:
    """The given config, or the one of the workdir; UserError for both or none.

    `model` is where the workdir's base model lies now, if not where it lay.
    """
    if config is not None and workdir is not None:
        raise UserError(f"--workdir: {workdir}: has a config of its own: drop --config")
    if workdir is not None:
        config = base_weights.at(_held_config(workdir), model)
    if config is None:
        raise UserError(
            "--workdir: missing: give the folder of a run, or "
            "--config=configs/geneval.py for its base model"
        )
    checks.check(config)
    return config


def _held_config(workdir: str) -> ml_collections.ConfigDict:
    held = read_config(workdir)
    try:
        return configs.from_json(held)
    except (UserError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"workdir: {workdir}/config.json: not that of a run of this version: {error}"
        ) from error


def default_weights(config: ml_collections.ConfigDict) -> str:
    """Which weights a run evaluates and leaves as its result."""
    return "ema" if config.train.ema else "learner"


def base(config: ml_collections.ConfigDict, sizes: Sequence[Size] = ()) -> Restored:
    """The pretrained model that the config names.

    `sizes`: what the prompts of its pictures ask for, as `sizes.asked` gives them.
    """
    return Restored(*load_model(config, sizes=sizes))


def tuned(
    config: ml_collections.ConfigDict,
    workdir: str | Path,
    step: int | None = None,
    weights: str | None = None,
    sizes: Sequence[Size] = (),
) -> Restored:
    """A run's weights at a checkpoint (default: the newest).

    `sizes` as in `base`. `weights`: ema or learner; by default what the run itself
    evaluates. Of the checkpoint only these are read; the run may still be training.
    UserError if there is no such checkpoint, or if the base model is not the one that
    the run began with.
    """
    weights = weights or default_weights(config)
    folder = _checkpoints(Path(workdir))
    with Checkpointer(folder, read_only=True) as checkpoints:
        step = checkpoints.latest() if step is None else step
        if step is None:
            raise _no_checkpoint(Path(workdir))
        model, loaded = starting_model(config, sizes=sizes)
        base_weights.check(workdir, config, loaded)
        like = {
            _PARTS[weights]: jax.eval_shape(
                lambda: trainable_part(config, model, loaded)
            )
        }
        restored = checkpoints.restore(like, step, partial=True)
    part = jax.device_get(restored[_PARTS[weights]])
    differs = base_weights.differs(part, loaded)
    return Restored(model, overlay(loaded, part), step, weights, differs)


def _checkpoints(workdir: Path) -> Path:
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise _no_checkpoint(workdir)
    return folder


def _no_checkpoint(workdir: Path) -> UserError:
    """What a workdir without a checkpoint holds instead, and what can be done."""
    results = [name for name in _RESULTS if (workdir / name).exists()]
    if not results:
        remedy = "the run has not come to its first one: checkpoint.every tells when"
    elif results[0] == _RESULTS[0]:
        remedy = (
            f"only its result, {results[0]}, is there, which has no other weights: "
            f"take sample --model={workdir / results[0]}"
        )
    else:
        remedy = (
            f"only its result, {results[0]}, is there, which has no other weights: "
            "diffusers loads it"
        )
    return UserError(f"workdir: {workdir}: holds no checkpoint: {remedy}")


@dataclasses.dataclass(frozen=True)
class Placed:
    """A restored model on all devices, with the embeddings of its prompts."""

    mesh: jax.sharding.Mesh
    specs: Any
    variables: Any
    text: TextTable


def place(
    config: ml_collections.ConfigDict, restored: Restored, texts: Sequence[str]
) -> Placed:
    """Put the weights on all devices here, whatever mesh they were trained on."""
    encoders = restored.model.prompts
    for line in prompt_checks.cut(encoders, (), registry.Context(), texts, "prompts"):
        print(line, file=sys.stderr)
    mesh = meshes.make_mesh({"data": -1})
    specs = meshes.specs(
        restored.variables, restored.model.denoiser.sharding_rules, mesh
    )
    return Placed(
        mesh,
        specs,
        meshes.place(restored.variables, specs, mesh),
        make_text_table(config, restored.model, restored.variables, texts),
    )


def make_pipeline(
    config: ml_collections.ConfigDict,
    restored: Restored,
    prompts: Sequence[str | Prompt],
) -> tuple[Pipeline, Variables]:
    """What draws these prompts by the sampler of evaluation, "ode", and its weights."""
    listed = [Prompt(one) if isinstance(one, str) else one for one in prompts]
    placed = place(config, restored, [prompt.text for prompt in listed])
    wanted = {prompt.size for prompt in listed if prompt.size}
    scale = config.eval.guidance_scale
    pipeline = Pipeline(
        image_spec(config),
        [
            Sized(model, {"ode": make_eval_sampler(config, model, scale)})
            for model in sized.models(config, restored.model, sorted(wanted)).values()
        ],
        placed.mesh,
        placed.specs,
        listed,
        placed.text,
    )
    return pipeline, placed.variables
