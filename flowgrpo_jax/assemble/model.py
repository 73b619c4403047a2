"""From `model` in a config to networks and weights, and from a run to its result."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import traverse_util

from flowgrpo_jax.config import families
from flowgrpo_jax.errors import UserError, not_one_of
from flowgrpo_jax.models.flow_model import FlowModel, Variables
from flowgrpo_jax.models.spec import ModelSpec
from flowgrpo_jax.rl.objectives.table import PRETRAINING
from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.runtime.resolution import Size
from flowgrpo_jax.worlds.registry import WORLDS


def model_spec(
    config: ml_collections.ConfigDict, sizes: Sequence[Size] = ()
) -> ModelSpec:
    """Which model the config names, and how its networks are to be.

    `sizes`: what prompts ask for beside the config's `resolution`.
    """
    train = config.train
    return ModelSpec(
        name=config.model,
        path=config.model_path,
        transformer_path=config.transformer_path,
        resolution=config.resolution,
        sizes=tuple(sizes),
        max_sequence_length=config.max_sequence_length,
        dtype=config.dtype,
        lora_rank=train.lora_rank if train.use_lora else 0,
        lora_alpha=train.lora_alpha,
        lora_targets=tuple(train.lora_targets),
    )


def load_model(
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh | None = None,
    sizes: Sequence[Size] = (),
) -> tuple[FlowModel, Variables]:
    """The networks and pretrained weights that `model` names.

    On the host; or large ones straight on the `mesh`, if one is given. `sizes` as in
    `model_spec`.
    """
    spec, code = model_spec(config, sizes), families.of(config.model).code
    place = code.find(spec)
    model = code.plan(spec, place)
    like = code.shapes(model, weights_dtype(config))
    if mesh is not None:
        specs = meshes.specs(like, model.denoiser.sharding_rules, mesh)
        like = meshes.abstract(like, specs, mesh)
    return model, code.read(place, model, like)


def abstract_model(
    config: ml_collections.ConfigDict, sizes: Sequence[Size] = ()
) -> tuple[FlowModel, Variables]:
    """The networks and the shapes of their weights; aliases need no download."""
    code = families.of(config.model).code
    model = code.plan(model_spec(config, sizes), place_of(config))
    return model, code.shapes(model, weights_dtype(config))


def place_of(config: ml_collections.ConfigDict) -> Path | None:
    """Where the model's files lie; None for a released one, whose networks are known."""
    family = families.of(config.model)
    if family.aliases.get(config.model) and not config.model_path:
        return None
    return family.code.find(model_spec(config))


def weights_dtype(config: ml_collections.ConfigDict) -> Any:
    """Of a large transformer: what learns whole is kept in fp32."""
    return jnp.dtype(config.dtype if config.train.use_lora else "float32")


def fresh_networks(config: ml_collections.ConfigDict) -> FlowModel:
    """The networks of a model that needs no files, without weights."""
    return families.of(config.model).code.plan(model_spec(config), None)


def new_model(config: ml_collections.ConfigDict) -> tuple[FlowModel, Variables]:
    """The embedded model with fresh random weights, for pretraining."""
    model = fresh_networks(config)
    return model, jax.device_get(jax.jit(model.init)(jax.random.key(config.seed)))


def starting_model(
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh | None = None,
    sizes: Sequence[Size] = (),
) -> tuple[FlowModel, Variables]:
    """What a run begins with: pretraining with nothing, unless `model` is a file."""
    pretraining = config.train.objective == PRETRAINING
    if pretraining and not families.of(config.model).embedded:
        raise not_one_of(
            "model",
            config.model,
            WORLDS,
            why=f"train.objective {PRETRAINING} learns from scenes of an embedded "
            "world",
        )
    if starts_fresh(config):
        return new_model(config)
    return load_model(config, mesh, sizes)


def starts_fresh(config: ml_collections.ConfigDict) -> bool:
    """Whether a run begins with random weights, not with those of a file."""
    return config.train.objective == PRETRAINING and config.model in WORLDS


def warm_start(
    config: ml_collections.ConfigDict, model: FlowModel, trainable: Variables
) -> Variables:
    """What a run trains, beginning with the adapter of `train.lora_path`, if any."""
    path = config.train.lora_path
    if not path:
        return trainable
    if not config.train.use_lora:
        raise UserError(
            f"train.lora_path: {path}: needs train.use_lora and a diffusers model"
        )
    code = families.of(config.model).code
    return {"lora": code.with_adapter(path, trainable["lora"], model)}


def save_result(path: Path, model: FlowModel, variables: Variables) -> None:
    """The result of a run in its workdir, as others read it.

    The embedded model's weights; of a large one the LoRA file or the transformer.
    """
    families.of(model.name).code.save_result(path, variables, model)


def trainable_part(
    config: ml_collections.ConfigDict, model: FlowModel, loaded: Variables
) -> Variables:
    """The variables that a run trains: an adapter, the transformer or everything.

    Of the transformer only what `train.parameters` matches; UserError if nothing does.
    """
    if config.train.use_lora:
        init = jax.jit(functools.partial(model.init, lora=True))
        return init(jax.random.key(config.seed))
    if config.train.trains_text:
        return loaded
    wanted = re.compile(config.train.parameters)
    leaves = traverse_util.flatten_dict(loaded["transformer"], sep="/")
    chosen = {path: leaf for path, leaf in leaves.items() if wanted.search(path)}
    if not chosen:
        raise UserError(
            f"train.parameters: {config.train.parameters}: matches no parameter of the "
            f"transformer: their names are like {', '.join(list(leaves)[:3])}"
        )
    return {"transformer": traverse_util.unflatten_dict(chosen, sep="/")}
