"""Compares a run's base model with its tuned one on the same noise, in one page.

python -m flowgrpo_jax.compare --workdir=DIR                   held-out prompts of the run
python -m flowgrpo_jax.compare --workdir=DIR --prompts=FILE.txt
python -m flowgrpo_jax.compare --workdir=DIR --model=FOLDER    where the base model is

One HTML file with all images in it and their rewards below them. Diffusers models are
sampled as diffusers' pipeline does, 28 steps and guidance 7, at the run's resolution.
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from flowgrpo_jax import cli
from flowgrpo_jax.data.prompts import Prompt

if TYPE_CHECKING:
    from flowgrpo_jax.report.pictures import Picture

FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", FLAGS)
_CHECKPOINT = flags.DEFINE_integer(
    "checkpoint",
    None,
    "Which checkpoint of --workdir, by its finished iterations; by default the newest.",
    flag_values=FLAGS,
)
_MODEL = flags.DEFINE_string(
    "model", None, "Where the run's base model is now, if it has been moved.", FLAGS
)
_WEIGHTS = flags.DEFINE_enum(
    "weights",
    None,
    ["ema", "learner"],
    "Which weights of the run; by default those that it evaluates.",
    flag_values=FLAGS,
)
_PROMPTS = flags.DEFINE_string(
    "prompts",
    None,
    "A .txt or .jsonl file or a prompt set; by default the run's held-out prompts.",
    FLAGS,
)
_MAX_PROMPTS = flags.DEFINE_integer(
    "max_prompts",
    16,
    "The most prompts to show, taken at equal distances from all.",
    lower_bound=1,
    flag_values=FLAGS,
)
_NUM_IMAGES = flags.DEFINE_integer(
    "num_images", 4, "Images per prompt.", lower_bound=1, flag_values=FLAGS
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", flag_values=FLAGS)
_GUIDANCE = flags.DEFINE_float(
    "guidance_scale", None, "Scale of the guidance; 1 turns it off.", flag_values=FLAGS
)
_NUM_STEPS = flags.DEFINE_integer(
    "num_steps", None, "Steps of the ODE sampler.", flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "HTML file to write; by default WORKDIR/compare.html.", FLAGS
)

# Images [member, height, width, 3] of every prompt and their measurements, name ->
# [prompt, member].
Side = tuple[Sequence[np.ndarray] | np.ndarray, Mapping[str, np.ndarray]]
_SMALL = 128  # pixels: the browser shows smaller ones as large pixels, not blurred
# A reward: name, means of base and tuned, share of images where tuned has more.
Row = tuple[str, float, float, float]


def main() -> None:
    from flowgrpo_jax import assemble
    from flowgrpo_jax.assemble import restore, sizes
    from flowgrpo_jax.inference import evaluator, sampling
    from flowgrpo_jax.runtime.workdir import atomic_write

    workdir = _WORKDIR.value
    config = options(restore.choose_config(None, workdir, _MODEL.value))
    assert workdir is not None  # choose_config says so
    prompts = thinned(_prompts(config), _MAX_PROMPTS.value)
    reward = assemble.make_eval_reward(config)
    prompts = assemble.judgeable(config, reward, prompts)
    output = Path(_OUTPUT.value or Path(workdir) / "compare.html")
    cli.writable_folder(output.parent, "--output")
    key = "--prompts" if _PROMPTS.value else "eval.prompts"
    source = _PROMPTS.value or config.eval.prompts
    asked = sizes.asked(config, prompts, key, source)
    restored = restore.tuned(config, workdir, _CHECKPOINT.value, _WEIGHTS.value, asked)
    restored.warn()

    def side(restored) -> Side:
        pipeline, variables = restore.make_pipeline(config, restored, prompts)
        count = _NUM_IMAGES.value
        images = sampling.by_prompt(pipeline, variables, len(prompts), count)
        owner = np.repeat(np.arange(len(prompts)), count)
        flat = [image for members in images for image in members]
        measured = evaluator.in_order(
            [
                (
                    places,
                    reward(
                        np.stack([flat[place] for place in places]),
                        [prompts[owner[place]] for place in places],
                    ),
                )
                for places in pipeline.by_size(owner)
            ]
        )
        if len(config.eval.reward or config.reward) == 1:
            del measured["avg"]  # the weighted sum of one reward is that reward again
        return images, {k: v.reshape(-1, count) for k, v in measured.items()}

    base = side(restore.base(config, asked))
    tuned = side(restored)
    facts = [
        f"{config.model} · {config.recipe} · {config.sample.eval_num_steps} steps · "
        f"guidance {config.eval.guidance_scale:g} · seed {config.eval.seed}",
        f"tuned: {restored}",
        shlex.join(["python", "-m", "flowgrpo_jax.compare", *sys.argv[1:]]),
    ]
    report = Path(workdir) / "report.html"
    link = os.path.relpath(report, output.parent) if report.exists() else None
    name = Path(workdir).absolute().name
    atomic_write(output, page(name, facts, prompts, base, tuned, link))
    for reward_name, before, after, better in summary(base, tuned):
        means = f"{before:.4g} base, {after:.4g} tuned, higher in {better:.0%}"
        print(f"{reward_name}: {means} of the images")
    if same := same_images(base, tuned):
        print(same)
    print(f"{len(prompts)} prompts, the base model and {restored}, in {output}")


def options(config: ConfigDict) -> ConfigDict:
    """The run's config with the options of the command."""
    from flowgrpo_jax.assemble import variants
    from flowgrpo_jax.config import families

    guidance, steps = _GUIDANCE.value, _NUM_STEPS.value
    usual = families.of(config.model).sampling
    if guidance is None:
        guidance = usual.get("eval.guidance_scale")
    if steps is None:
        steps = usual.get("sample.eval_num_steps")
    return variants.with_options(config, _SEED.value, guidance, steps)


def _prompts(config: ConfigDict) -> list[Prompt]:
    from flowgrpo_jax import assemble

    if _PROMPTS.value is not None:
        return assemble.load_prompt_set(_PROMPTS.value, "test", "--prompts")
    return assemble.load_prompt_set(config.eval.prompts, "test", "eval.prompts")


def thinned(prompts: Sequence[Prompt], most: int) -> list[Prompt]:
    """At most `most` prompts, at equal distances from the first to the last."""
    count = min(most, len(prompts))
    chosen = np.linspace(0, len(prompts) - 1, count).round().astype(int)
    return [prompts[number] for number in chosen]


def summary(base: Side, tuned: Side) -> list[Row]:
    """Every measurement of both sides."""
    return [
        (
            name,
            float(before.mean()),
            float(after.mean()),
            float((after > before).mean()),
        )
        for name, before in base[1].items()
        for after in [tuned[1][name]]
    ]


def same_images(base: Side, tuned: Side) -> str:
    """How many images are the same in both, to the last pixel of a PNG; "" for none."""
    from flowgrpo_jax.runtime import images

    pairs = zip(base[0], tuned[0], strict=True)
    same = np.array(
        [
            (images.to_uint8(before) == images.to_uint8(after)).all(axis=(1, 2, 3))
            for before, after in pairs
        ]
    )
    if not same.any():
        return ""
    count = "all" if same.all() else f"{same.sum()} of"
    return f"{count} {same.size} images are the same in both, to the last pixel"


def page(
    name: str,
    facts: Sequence[str],
    prompts: Sequence[Prompt],
    base: Side,
    tuned: Side,
    report_link: str | None = None,
) -> str:
    """The page: means first, then two rows of images for every prompt.

    `facts`: lines of its head. `report_link`: where the report of the run is, if any.
    """
    from flowgrpo_jax.report.templating import render

    return render(
        "compare.html.j2",
        title=f"{name}: base and tuned on the same noise",
        facts=facts,
        report_link=report_link,
        means=[
            (reward, f"{before:.4g}", f"{after:.4g}", f"{better:.0%}")
            for reward, before, after, better in summary(base, tuned)
        ],
        same_images=same_images(base, tuned),
        is_small=max(members.shape[1] for members in base[0]) < _SMALL,
        prompts=[
            (prompt.text, [_row("base", base, number), _row("tuned", tuned, number)])
            for number, prompt in enumerate(prompts)
        ],
    )


def _row(which: str, side: Side, number: int) -> "list[Picture]":
    """The images of one prompt, with their rewards."""
    from flowgrpo_jax.report.pictures import Picture, data_url
    from flowgrpo_jax.runtime import images

    sampled, measured = side
    row = []
    for member, image in enumerate(sampled[number]):
        scores = [f"{k}: {v[number, member]:.4g}" for k, v in measured.items()]
        source = data_url(images.png(image))
        alternative = f"{which}, image {member}"
        row.append(Picture(source, alternative, which, ", ".join(scores)))
    return row


if __name__ == "__main__":
    cli.run(main, FLAGS)
