"""The weights of the base model or of a workdir's checkpoint, ready to make images."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from flowgrpo_jax import assemble, checks, programs
from flowgrpo_jax import config as configs
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.flow_model import FlowModel, Variables, overlay
from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.runtime.checkpoint import Checkpointer
from flowgrpo_jax.runtime.workdir import read_config
from flowgrpo_jax.text_table import TextTable


@dataclasses.dataclass(frozen=True)
class Restored:
    """A model, its weights on the host, and the checkpoint that they are from."""

    model: FlowModel
    variables: Variables
    checkpoint: int | None = None  # finished iterations; None for the base model


def choose_config(
    config: ml_collections.ConfigDict | None, workdir: str | None
) -> ml_collections.ConfigDict:
    """The given config, or the one of the workdir; UserError for both or none."""
    if config is not None and workdir is not None:
        raise UserError(f"--workdir: {workdir}: has a config of its own: drop --config")
    if workdir is not None:
        config = configs.from_json(read_config(workdir))
    if config is None:
        raise UserError(
            "--workdir: missing: give the folder of a run, or "
            "--config=configs/geneval.py for its base model"
        )
    checks.check(config)
    return config


def base(config: ml_collections.ConfigDict) -> Restored:
    """The pretrained model that the config names."""
    return Restored(*assemble.load_model(config))


def tuned(
    config: ml_collections.ConfigDict, workdir: str | Path, step: int | None = None
) -> Restored:
    """What a run would evaluate at a checkpoint (default: the newest): its EMA.

    Of the checkpoint only these weights are read; the run may still be training.
    """
    model, loaded = assemble.starting_model(config)
    part = "ema" if config.train.ema else "trainable"
    like = {
        part: jax.eval_shape(lambda: assemble.trainable_part(config, model, loaded))
    }
    with Checkpointer(Path(workdir) / "checkpoints", read_only=True) as checkpoints:
        step = checkpoints.latest() if step is None else step
        restored = checkpoints.restore(like, step, partial=True)
    return Restored(model, overlay(loaded, jax.device_get(restored[part])), step)


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
    mesh = meshes.make_mesh({"data": -1})
    specs = meshes.specs(restored.variables, programs.SHARDING_RULES, mesh)
    return Placed(
        mesh,
        specs,
        meshes.place(restored.variables, specs, mesh),
        assemble.make_text_table(config, restored.model, restored.variables, texts),
    )
