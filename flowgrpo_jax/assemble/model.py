"""From `model` in a config to networks and weights, and from a run to its result."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import traverse_util

from flowgrpo_jax.config.keys import is_embedded
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import hub, lora_files
from flowgrpo_jax.models.flow_model import FlowModel, Variables
from flowgrpo_jax.models.sd3 import family as sd3
from flowgrpo_jax.models.sd3 import transformer_config
from flowgrpo_jax.models.sd3.sharding import SHARDING_RULES
from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.runtime import paths
from flowgrpo_jax.worlds import embedded
from flowgrpo_jax.worlds.registry import WORLDS


def load_model(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh | None = None
) -> tuple[FlowModel, Variables]:
    """The networks and pretrained weights that `model` names.

    On the host; or large ones straight on the `mesh`, if one is given.
    """
    if is_embedded(config.model):
        return _load_embedded(config)
    folder = hub.folder(config.model_path or config.model)
    model = _large_model(config, folder)
    like = sd3.shapes(model, weights_dtype(config))
    if mesh is not None:
        specs = meshes.specs(like, SHARDING_RULES, mesh)
        like = meshes.abstract(like, specs, mesh)
    return model, sd3.read(folder, model, like)


def abstract_model(
    config: ml_collections.ConfigDict,
) -> tuple[FlowModel, Variables]:
    """The networks and the shapes of their weights; aliases need no download."""
    if is_embedded(config.model):
        model, loaded = _load_embedded(config)
        return model, jax.eval_shape(lambda: loaded)
    planned = config.model in hub.ALIASES and not config.model_path
    place = config.model_path or config.model
    model = _large_model(config, None if planned else hub.folder(place))
    return model, sd3.shapes(model, weights_dtype(config))


def weights_dtype(config: ml_collections.ConfigDict) -> Any:
    """Of a large transformer: what learns whole is kept in fp32."""
    return jnp.dtype(config.dtype if config.train.use_lora else "float32")


def _large_model(config: ml_collections.ConfigDict, folder: Path | None) -> FlowModel:
    model = sd3.make_model(
        config.model,
        folder,
        config.resolution,
        config.max_sequence_length,
        config.train.lora_rank if config.train.use_lora else 0,
        config.train.lora_alpha,
        jnp.dtype(config.dtype),
    )
    return _with_targets(config, model)


def _with_targets(config: ml_collections.ConfigDict, model: FlowModel) -> FlowModel:
    """The model whose LoRA adapts the layers of `train.lora_targets`."""
    layers = transformer_config.adapted_layers(config.train.lora_targets)
    adapted = dataclasses.replace(model.config, lora_targets=layers)
    return dataclasses.replace(model, config=adapted)


def _load_embedded(config) -> tuple[FlowModel, Variables]:
    name = config.model
    if config.resolution:
        raise UserError(
            f"resolution: {config.resolution}: must be 0: the embedded model has one"
        )
    own = WORLDS[name].model.WEIGHTS if name in WORLDS else name
    path = paths.local(config.model_path or own)
    if not path.is_file():
        remedy = "install the package again" if name in WORLDS else "give a file"
        raise UserError(f"model: {name}: no weights at {path}: {remedy}")
    try:
        variables, size = embedded.load(path)
        model = _with_lora(config, size)
    except (TypeError, KeyError) as error:  # the header tells of something else
        raise _no_weights_of_ours(name) from error
    wanted = jax.eval_shape(model.init, jax.random.key(0))
    if jax.tree.map(jnp.shape, wanted) != jax.tree.map(jnp.shape, variables):
        raise _no_weights_of_ours(name)
    return model, variables


def _no_weights_of_ours(name: str) -> UserError:
    return UserError(
        f"model: {name}: holds other weights than those of an embedded model: give "
        "a weights.safetensors that this package has written"
    )


def new_model(config: ml_collections.ConfigDict) -> tuple[FlowModel, Variables]:
    """The embedded model with fresh random weights, for pretraining."""
    model = _with_lora(config, WORLDS[config.model].model.Size())
    return model, jax.device_get(jax.jit(model.init)(jax.random.key(config.seed)))


def starting_model(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh | None = None
) -> tuple[FlowModel, Variables]:
    """What a run begins with: pretraining with nothing, unless `model` is a file."""
    pretraining = config.train.objective == "flow_matching"
    if pretraining and not is_embedded(config.model):
        raise UserError(
            f"model: {config.model}: train.objective flow_matching learns from scenes "
            f"of an embedded world: must be one of {', '.join(WORLDS)}"
        )
    return new_model(config) if starts_fresh(config) else load_model(config, mesh)


def starts_fresh(config: ml_collections.ConfigDict) -> bool:
    """Whether a run begins with random weights, not with those of a file."""
    return config.train.objective == "flow_matching" and config.model in WORLDS


def warm_start(
    config: ml_collections.ConfigDict, model: FlowModel, trainable: Variables
) -> Variables:
    """What a run trains, beginning with the adapter of `train.lora_path`, if any."""
    path = config.train.lora_path
    if not path:
        return trainable
    if not config.train.use_lora or is_embedded(config.model):
        raise UserError(
            f"train.lora_path: {path}: needs train.use_lora and a diffusers model"
        )
    return {"lora": sd3.with_adapter(path, trainable["lora"], model)}


def save_result(path: Path, model: FlowModel, variables: Variables) -> None:
    """The result of a run in its workdir, as others read it.

    The embedded model's weights; of a large one the LoRA file or the transformer.
    """
    if is_embedded(model.name):
        host = jax.device_get(variables)
        embedded.save(path / "weights.safetensors", host, model)
    elif "lora" in variables:
        lora_files.write_diffusers(path, sd3.adapter(variables, model))
    else:
        sd3.write_transformer(path / "transformer", variables, model)


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


def _with_lora(config, size: embedded.Size) -> FlowModel:
    rank = config.train.lora_rank if config.train.use_lora else 0
    model = WORLDS[size.world].model.make_model(
        size, rank, config.train.lora_alpha, jnp.dtype(config.dtype)
    )
    return _with_targets(config, model)
