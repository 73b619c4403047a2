"""Images of any prompts from weights that are there, and their files."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax.config import checks, families
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.inference import restore
from flowgrpo_jax.inference.pipeline import Pipeline
from flowgrpo_jax.models.text import UNKNOWN
from flowgrpo_jax.runtime import images as grids

_SMALL = 128  # pixels: smaller images are enlarged on the grid


def model_config(model: str) -> ConfigDict:
    """A config that samples `model` with the defaults of its pipeline in diffusers."""
    config = configs.make(model=model)
    for key, value in families.of(model).sampling.items():
        configs.assign(config, key, value)
    return config


def with_options(
    config: ConfigDict, seed: int, guidance_scale: float | None, num_steps: int | None
) -> ConfigDict:
    """The config with these options of its evaluation sampler; None leaves one."""
    config = configs.from_json(config.to_dict())
    config.eval.seed = seed
    if guidance_scale is not None:
        config.eval.guidance_scale = guidance_scale
    if num_steps is not None:
        config.sample.eval_num_steps = num_steps
    checks.check(config)
    return config


def sample(config, restored, texts: Sequence[str], num_images: int) -> np.ndarray:
    """Images [prompt, member, height, width, 3] in [0, 1] of a `restore.Restored`."""
    scale = config.eval.guidance_scale
    placed = restore.place(config, restored, texts)
    pipeline = Pipeline(
        config,
        restored.model,
        placed.mesh,
        placed.specs,
        texts,
        placed.text,
        {"ode": assemble.make_eval_sampler(config, restored.model, scale)},
    )
    prompt, member = np.divmod(np.arange(len(texts) * num_images), num_images)
    images = pipeline.images(placed.variables, prompt, member, "ode")
    return images.reshape(len(texts), num_images, *images.shape[1:])


def save(output: Path, images: np.ndarray, texts: Sequence[str]) -> Path:
    """One PNG per image, named by prompt and member; the path of one that has all."""
    for number, (text, members) in enumerate(zip(texts, images, strict=True)):
        for member, image in enumerate(members):
            grids.save_grid(output / file_name(number, text, member), image[None], 1)
    prompts, num_images, height = images.shape[:3]
    path = output / "grid.png"
    grids.save_grid(
        path,
        images.reshape(prompts * num_images, *images.shape[2:]),
        columns=num_images,
        scale=max(1, _SMALL // height),
        captions=[text for text in texts for _ in range(num_images)],
    )
    return path


def file_name(number: int, text: str, member: int) -> str:
    """Such as 000_a-photo-of-a-red-circle_0.png."""
    words = re.sub(r"\W+", "-", text.lower()).strip("-")[:60]
    return f"{number:03d}_{words}_{member}.png"


def unknown_words(tokenizer, text: str) -> list[str]:
    """The words that a word-level tokenizer cannot tell apart, in order."""
    words = dict.fromkeys(re.findall(r"\w+", text.lower()))
    return [word for word in words if UNKNOWN in tokenizer([word])]


def judgeable(config: ConfigDict, reward, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts as the reward needs them; UserError, before any work, if it cannot.

    It judges random images to find out.
    """
    known = with_metadata(config, prompts)
    reward(np.random.default_rng(0).random((len(known), 32, 32, 3), np.float32), known)
    return known


def with_metadata(config: ConfigDict, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts; those without metadata as the config's prompt sets have them."""
    if all(prompt.metadata for prompt in prompts):
        return list(prompts)
    sets = assemble.load_prompt_set(config.prompts, "train")
    sets += assemble.load_prompt_set(config.eval.prompts, "test", "eval.prompts")
    named = {prompt.text: prompt for prompt in sets}
    return [
        prompt if prompt.metadata else named.get(prompt.text, prompt)
        for prompt in prompts
    ]
