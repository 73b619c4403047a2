"""From `prompts` in a config to the prompts, checked against the rewards that see them."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_collections
import numpy as np

from flowgrpo_jax.assemble import prompt_checks
from flowgrpo_jax.data import prompt_sets, tfds_prompts
from flowgrpo_jax.data.prompt_files import load_prompts
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import not_one_of
from flowgrpo_jax.rewards import registry
from flowgrpo_jax.rewards.registry import Reward
from flowgrpo_jax.worlds.registry import WORLDS

# Name -> the prompts of its "train" or "test" split.
PROMPT_SETS: dict[str, Callable[[str], list[Prompt]]] = {
    **{
        name: functools.partial(tfds_prompts.load, prompt_set)
        for name, prompt_set in prompt_sets.PROMPT_SETS.items()
    },
    **{name: one.prompts for name, one in WORLDS.items()},
}


def load_prompt_set(name: str, split: str, key: str = "prompts") -> list[Prompt]:
    """Prompts of a named set ("train" or "test" split) or of a .txt or .jsonl file."""
    if name in PROMPT_SETS:
        return PROMPT_SETS[name](split)
    if Path(name).suffix in (".txt", ".jsonl"):
        return load_prompts(name, key)
    raise not_one_of(key, name, PROMPT_SETS, ", or a .txt or .jsonl file")


def check_prompts(
    config: ml_collections.ConfigDict,
    context: registry.Context,
    prompts: Sequence[Prompt],
    key: str = "prompts",
) -> None:
    """UserError for a prompt of `key` that a reward which sees it cannot score."""
    source = config.eval.prompts if key == "eval.prompts" else config.prompts
    prompt_checks.check(judges(config, key), context, prompts, source, key)


def judges(config: ml_collections.ConfigDict, key: str) -> list[str]:
    """Names of the rewards that see the images of `key`'s prompts."""
    if key != "eval.prompts":
        return list(config.reward)
    held_out = [name for name in config.monitors if registry.is_known(name)]
    return [*(config.eval.reward or config.reward), *held_out]


def judgeable(
    config: ml_collections.ConfigDict, reward: Reward, prompts: Sequence[Prompt]
) -> list[Prompt]:
    """The prompts as the reward needs them; UserError, before any work, if it cannot.

    It judges random images to find out.
    """
    known = with_metadata(config, prompts)
    reward(np.random.default_rng(0).random((len(known), 32, 32, 3), np.float32), known)
    return known


def with_metadata(
    config: ml_collections.ConfigDict, prompts: Sequence[Prompt]
) -> list[Prompt]:
    """The prompts; those without metadata as the config's prompt sets have them."""
    if all(prompt.metadata for prompt in prompts):
        return list(prompts)
    sets = load_prompt_set(config.prompts, "train")
    sets += load_prompt_set(config.eval.prompts, "test", "eval.prompts")
    named = {prompt.text: prompt for prompt in sets}
    return [
        prompt if prompt.metadata else named.get(prompt.text, prompt)
        for prompt in prompts
    ]
