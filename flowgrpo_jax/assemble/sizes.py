"""From sizes that prompts ask for to the run's model at each of them."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import ml_collections

from flowgrpo_jax.assemble.model import abstract_model, model_spec, place_of
from flowgrpo_jax.assemble.prompts import load_prompt_set
from flowgrpo_jax.config import families
from flowgrpo_jax.data.buckets import Buckets, by_size
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.flow_model import FlowModel, Variables
from flowgrpo_jax.runtime.resolution import Size

Models = dict[Size, FlowModel]


def asked(
    config: ml_collections.ConfigDict,
    prompts: Sequence[Prompt],
    key: str = "prompts",
    source: str = "",
) -> tuple[Size, ...]:
    """The sizes that prompts ask for, each once, in rising order.

    UserError, which names the line of `source`, for one that the model cannot draw.
    """
    first: dict[Size, Prompt] = {}
    for prompt in prompts:
        if size := prompt.size:
            first.setdefault(size, prompt)
    if first:
        spec, place = model_spec(config), place_of(config)
        code = families.of(config.model).code
        for size, prompt in first.items():
            try:
                code.plan(dataclasses.replace(spec, resolution=str(size)), place)
            except UserError as error:
                where = f"{key}: {source}:{prompt.index + 1}"
                raise UserError(f"{where}: {error}") from error
    return tuple(sorted(first))


def of_evaluation(config: ml_collections.ConfigDict) -> tuple[Size, ...]:
    """The sizes that the held-out prompts of a config ask for."""
    source = config.eval.prompts
    if Path(source).suffix != ".jsonl":  # nothing else can ask for one
        return ()
    held_out = load_prompt_set(source, "test", "eval.prompts")
    return asked(config, held_out, "eval.prompts", source)


def models(
    config: ml_collections.ConfigDict, model: FlowModel, sizes: Sequence[Size]
) -> Models:
    """The config's model first, and the same networks at the other sizes.

    Sigmas that depend on the number of tokens depend on the size.
    """
    made = {model.size: model}
    others = [size for size in sizes if size != model.size]
    if others:
        spec, place = model_spec(config), place_of(config)
        code = families.of(config.model).code
        for size in others:
            planned = code.plan(dataclasses.replace(spec, resolution=str(size)), place)
            made[size] = dataclasses.replace(
                model, latent_shape=planned.latent_shape, shift=planned.shift
            )
    return made


def largest_abstract(
    config: ml_collections.ConfigDict,
) -> tuple[FlowModel, Variables]:
    """`abstract_model` at the largest size of the training prompts.

    They need not be on this machine: then it is the config's size.
    """
    prompts: list[Prompt] = []
    if Path(config.prompts).suffix == ".jsonl":  # nothing else can ask for a size
        with contextlib.suppress(UserError):
            prompts = load_prompt_set(config.prompts, "train")
    found = asked(config, prompts, "prompts", config.prompts)
    model, shapes = abstract_model(config, found)
    made = models(config, model, found)
    known = by_size(prompts, model.size) or [model.size]
    return max((made[size] for size in known), key=lambda one: one.image_tokens), shapes


def lines(prompts: Buckets, prompts_per_iteration: int) -> list[str]:
    """What is told of a run whose prompts are of several sizes."""
    if len(prompts) < 2:
        return []
    counts = ", ".join(f"{len(some):,} of {size}" for size, some in prompts.items())
    return [
        f"sizes: {counts} prompts: an iteration has those of one size, "
        "and the plan is that of the largest",
        *(
            f"warning: prompts: {len(some)} of {size}: fewer than the "
            f"{prompts_per_iteration} of an iteration: they are drawn several times in it"
            for size, some in prompts.items()
            if len(some) < prompts_per_iteration
        ),
    ]
