"""Images of any prompts, from the base model or a tuned one.

python -m flowgrpo_jax.sample --prompt="a photo of a red circle"
python -m flowgrpo_jax.sample --prompt="a photo of a red circle" --workdir=DIR

The same --seed gives base and tuned weights the same noise: compare file by file.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from flowgrpo_jax import commands
from flowgrpo_jax.errors import UserError

FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The base model of this config; default the embedded one.", FLAGS
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The tuned model of this run.", FLAGS)
_CHECKPOINT = flags.DEFINE_integer(
    "checkpoint", None, "Iterations done; default the newest.", flag_values=FLAGS
)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be repeated.", FLAGS)
_PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, ".txt or .jsonl.", FLAGS)
_NUM_IMAGES = flags.DEFINE_integer(
    "num_images", 4, "Images per prompt.", lower_bound=1, flag_values=FLAGS
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the noise.", flag_values=FLAGS)
_GUIDANCE = flags.DEFINE_float(
    "guidance_scale",
    None,
    "1 for none; default the config's.",
    flag_values=FLAGS,
)
_NUM_STEPS = flags.DEFINE_integer(
    "num_steps", None, "Default the config's.", flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string("output", "samples", "Folder of the images.", FLAGS)
_SMALL = 128  # pixels: smaller images are enlarged on the grid


def main() -> None:
    from flowgrpo_jax import config as configs
    from flowgrpo_jax import restore

    workdir = _WORKDIR.value
    if _CHECKPOINT.value is not None and workdir is None:
        raise UserError(f"--checkpoint: {_CHECKPOINT.value}: give its --workdir too")
    texts = _prompts()
    config = _CONFIG.value
    if config is None and workdir is None:
        config = configs.make()
    config = restore.choose_config(config, workdir)
    config = with_options(config, _SEED.value, _GUIDANCE.value, _NUM_STEPS.value)
    output = commands.writable_folder(Path(_OUTPUT.value), "--output")
    if workdir is None:
        restored = restore.base(config)
    else:
        restored = restore.tuned(config, workdir, _CHECKPOINT.value)
    for text in texts:
        if unknown := unknown_words(restored.model.tokenizer, text):
            names = ", ".join(unknown)
            print(f"warning: {text}: unknown words: {names}", file=sys.stderr)
    images = sample(config, restored, texts, _NUM_IMAGES.value)
    save(output, images, texts)
    print(f"{images.shape[0] * images.shape[1]} images in {output}, all in grid.png")


def with_options(
    config: ConfigDict, seed: int, guidance_scale: float | None, num_steps: int | None
) -> ConfigDict:
    """The config with these options of its evaluation sampler; None leaves one."""
    from flowgrpo_jax import checks

    config = ConfigDict(config.to_dict())
    config.eval.seed = seed
    if guidance_scale is not None:
        config.eval.guidance_scale = guidance_scale
    if num_steps is not None:
        config.sample.eval_num_steps = num_steps
    checks.check(config)
    return config


def sample(config, restored, texts: Sequence[str], num_images: int) -> np.ndarray:
    """Images [prompt, member, height, width, 3] in [0, 1] of a `restore.Restored`."""
    from flowgrpo_jax import restore
    from flowgrpo_jax.pipeline import Pipeline

    placed = restore.place(restored, texts)
    pipeline = Pipeline(
        config,
        restored.model,
        placed.mesh,
        placed.specs,
        texts,
        placed.text,
        {"guided": config.eval.guidance_scale},
    )
    prompt, member = np.divmod(np.arange(len(texts) * num_images), num_images)
    images = pipeline.images(placed.variables, prompt, member, "guided")
    return images.reshape(len(texts), num_images, *images.shape[1:])


def save(output: Path, images: np.ndarray, texts: Sequence[str]) -> None:
    """One PNG per image, named by prompt and member, and all of them on grid.png."""
    from flowgrpo_jax.runtime import images as grids

    for number, (text, members) in enumerate(zip(texts, images, strict=True)):
        for member, image in enumerate(members):
            grids.save_grid(output / file_name(number, text, member), image[None], 1)
    prompts, num_images, height = images.shape[:3]
    grids.save_grid(
        output / "grid.png",
        images.reshape(prompts * num_images, *images.shape[2:]),
        columns=num_images,
        scale=max(1, _SMALL // height),
        captions=[text for text in texts for _ in range(num_images)],
    )


def file_name(number: int, text: str, member: int) -> str:
    """Such as 000_a-photo-of-a-red-circle_0.png."""
    words = re.sub(r"\W+", "-", text.lower()).strip("-")[:60]
    return f"{number:03d}_{words}_{member}.png"


def unknown_words(tokenizer, text: str) -> list[str]:
    """The words that a word-level tokenizer cannot tell apart, in order."""
    from flowgrpo_jax.models.text import UNKNOWN

    words = dict.fromkeys(re.findall(r"\w+", text.lower()))
    return [word for word in words if UNKNOWN in tokenizer([word])]


def _prompts() -> list[str]:
    from flowgrpo_jax.data.prompts import load_prompts

    texts = [text.strip() for text in _PROMPT.value]
    if _PROMPTS_FILE.value is not None:
        texts += [prompt.text for prompt in load_prompts(_PROMPTS_FILE.value)]
    if not texts:
        raise UserError("--prompt: missing: give one, or a file with --prompts_file")
    if not all(texts):
        raise UserError("--prompt: '': an empty prompt: say what to draw")
    return texts


if __name__ == "__main__":
    commands.run(main, FLAGS)
