"""Samples images of any prompts from the base model or a tuned one.

python -m flowgrpo_jax.sample --prompt="a photo of a red circle"
python -m flowgrpo_jax.sample --prompt="a photo of a red circle" --workdir=DIR
python -m flowgrpo_jax.sample --prompt="a photo of a red circle" --search=rbf --budget=500

The same --seed gives base and tuned weights the same noise: compare file by file.
A search spends a budget of network evaluations per prompt on better images.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from flowgrpo_jax import cli
from flowgrpo_jax.data.prompt_files import checked, load_prompts
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError, not_one_of
from flowgrpo_jax.inference.search import methods, noise_optimization
from flowgrpo_jax.inference.search.methods import METHODS

FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Sample the base model of this config; by default the embedded model.",
    FLAGS,
)
_MODEL = flags.DEFINE_string(
    "model",
    None,
    "A diffusers folder, hub id or alias, sampled as diffusers does: 28 steps, "
    "guidance 7, the model's own resolution, 256 T5 tokens. With --workdir: where the "
    "run's base model is now, if it has been moved.",
    FLAGS,
)
_NEGATIVE = flags.DEFINE_string(
    "negative_prompt", None, "By default that of the config.", FLAGS
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Sample the tuned model of the run in this folder.", FLAGS
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
_PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "A prompt; the flag may be repeated.", FLAGS
)
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", None, "A .txt or .jsonl file of prompts.", FLAGS
)
_NUM_IMAGES = flags.DEFINE_integer(
    "num_images", 4, "Images per prompt.", lower_bound=1, flag_values=FLAGS
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", flag_values=FLAGS)
_GUIDANCE = flags.DEFINE_float(
    "guidance_scale",
    None,
    "Scale of the guidance, 1 for none; by default that of the config.",
    flag_values=FLAGS,
)
_NUM_STEPS = flags.DEFINE_integer(
    "num_steps",
    None,
    "Steps of the sampler; by default those of the config.",
    flag_values=FLAGS,
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Folder for the images; by default a new one, drawn/000, drawn/001 and so on, in "
    "--workdir or here.",
    FLAGS,
)
_SEARCH = flags.DEFINE_enum(
    "search",
    None,
    list(METHODS),
    "Search for better images instead. "
    + "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items()),
    flag_values=FLAGS,
)
_BUDGET = flags.DEFINE_integer(
    "budget",
    500,
    "For --search: network evaluations per prompt; a guided evaluation counts once.",
    lower_bound=1,
    flag_values=FLAGS,
)
_REWARD = flags.DEFINE_enum(
    "reward",
    None,
    list(noise_optimization.REWARDS),
    "For --search: the reward to maximise; by default that of the config.",
    flag_values=FLAGS,
)
_JUDGED_STEPS = flags.DEFINE_integer(
    "judged_steps",
    10,
    "For --search=cfg_rejection: steps after which candidates are chosen.",
    lower_bound=1,
    flag_values=FLAGS,
)
_KEEP = flags.DEFINE_float(
    "keep",
    0.25,
    "For --search=cfg_rejection: share of the candidates that are chosen.",
    flag_values=FLAGS,
)
_OF_A_SEARCH = ("budget", "reward", "judged_steps", "keep")
# (images [image, height, width, 3], the number of their prompt) -> a score for each.
Judge = Callable[..., np.ndarray]


def main() -> None:
    from flowgrpo_jax import config as configs
    from flowgrpo_jax.assemble import restore, sizes, variants
    from flowgrpo_jax.inference import sampling

    workdir = _WORKDIR.value
    for flag in (_CHECKPOINT, _WEIGHTS):
        if flag.value is not None and workdir is None:
            raise UserError(f"--{flag.name}: {flag.value}: give its --workdir too")
    prompts = _prompts()
    config = _CONFIG.value
    if _MODEL.value is not None and config is not None:
        raise UserError(f"--model: {_MODEL.value}: --config names one already")
    if workdir is None and config is None:
        config = variants.model_config(_MODEL.value) if _MODEL.value else configs.make()
    config = restore.choose_config(config, workdir, _MODEL.value)
    config = variants.with_options(
        config, _SEED.value, _GUIDANCE.value, _NUM_STEPS.value
    )
    if _NEGATIVE.value is not None:
        config.negative_prompt = _NEGATIVE.value
    _check_search(config)
    judge = _judge(config, prompts) if _SEARCH.value else None
    output = _output(workdir)
    source = _PROMPTS_FILE.value or ""
    asked = sizes.asked(config, prompts, "--prompts_file", source)
    if workdir is None:
        restored = restore.base(config, asked)
    else:
        restored = restore.tuned(
            config, workdir, _CHECKPOINT.value, _WEIGHTS.value, asked
        )
    restored.warn()
    texts = [prompt.text for prompt in prompts]
    for text in texts:
        tokenizer = restored.model.tokenizer
        if tokenizer and (unknown := sampling.unknown_words(tokenizer, text)):
            names = ", ".join(unknown)
            print(f"warning: {text}: unknown words: {names}", file=sys.stderr)
    if _SEARCH.value is None:
        pipeline, variables = restore.make_pipeline(config, restored, prompts)
        count = _NUM_IMAGES.value
        images = sampling.by_prompt(pipeline, variables, len(texts), count)
    else:
        images = _search(config, restored, prompts, judge)
    if output is None:
        output = new_folder(Path(workdir or ".") / "drawn")
    grid = sampling.save(output, images, texts)
    count = sum(map(len, images))
    print(f"{count} images of {restored} in {output}, all in {grid}")


def _output(workdir: str | None) -> Path | None:
    """--output, with a warning if images are in it; None to make a new folder.

    UserError, before any work, for one that cannot be written to.
    """
    if _OUTPUT.value is None:
        cli.writable_folder(Path(workdir or "."), "--output")
        return None
    output = cli.writable_folder(Path(_OUTPUT.value), "--output")
    if existing := len(list(output.glob("*.png"))):
        print(
            f"warning: --output: {output}: holds {existing} images: those of the same "
            "name are replaced",
            file=sys.stderr,
        )
    return output


def new_folder(path: Path) -> Path:
    """Makes and returns `path`/000, or the next number after those that are there."""
    path = cli.writable_folder(path, "--output")
    taken = [int(entry.name) for entry in path.iterdir() if entry.name.isdecimal()]
    number = max(taken, default=-1) + 1
    while True:
        folder = path / f"{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:  # another process was faster
            number += 1
        else:
            return folder


def _search(
    config, restored, prompts: Sequence[Prompt], judge: Judge | None
) -> list[np.ndarray]:
    """Images [kept, height, width, 3] of each prompt that --search finds, best first.

    Prints what they cost, and the judge's mean scores of them and of as many plain
    images. Runs on the first device.
    """
    import jax

    from flowgrpo_jax import assemble
    from flowgrpo_jax.assemble import sizes
    from flowgrpo_jax.inference.search import setting

    model, scale = restored.model, config.eval.guidance_scale
    texts = [prompt.text for prompt in prompts]
    models = sizes.models(config, model, [p.size for p in prompts if p.size])
    # One for all prompts of a size: another one would compile again.
    samplers = {
        size: assemble.make_eval_sampler(config, one, scale)
        for size, one in models.items()
    }
    table = assemble.make_text_table(config, model, restored.variables, texts)
    first = setting.Setting(
        sampler=samplers[model.size],
        variables=jax.device_put(restored.variables),
        text=(),
        decode=model.decode,
        latent_shape=model.latent_shape,
        key=jax.random.key(config.eval.seed),
        microbatch=config.microbatch,
    )
    guidance = methods.Guidance(model.velocity, scale, _JUDGED_STEPS.value, _KEEP.value)
    smooth = noise_optimization.REWARDS.get(str(_REWARD.value))
    method = str(_SEARCH.value)
    best = []
    for number, text in enumerate(texts):
        rows = (table.rows([text]), table.empty)
        size = prompts[number].size or model.size
        one = dataclasses.replace(
            first,
            sampler=samplers[size],
            latent_shape=models[size].latent_shape,
            text=rows,
            prompt=number,
        )
        reward = judge and functools.partial(judge, prompt=number)
        result = methods.search(method, one, _BUDGET.value, reward, guidance, smooth)
        if not np.isfinite(result.images).all():
            raise UserError(
                f"model: {config.model}: its images are not finite: the weights are "
                "damaged or the run has diverged: take earlier ones"
            )
        outcome = f"{result.evaluations} network evaluations"
        if reward is not None:
            latents, _ = setting.plain(one, range(len(result.images)))
            before = reward(setting.decode(one, latents)).mean()
            after = reward(result.images).mean()
            name = _score_name(config)
            outcome = f"{name} {before:.3f} plain, {after:.3f} found, {outcome}"
        print(f"{text}: {outcome}")
        best.append(result.images)
    return best


def _check_search(config: ConfigDict) -> None:
    """UserError for flags that do not go together."""
    method = _SEARCH.value
    if method is None:
        for name in _OF_A_SEARCH:
            if FLAGS[name].present:
                raise UserError(f"--{name}: {FLAGS[name].value}: needs --search")
        return
    if _NUM_IMAGES.present:
        raise UserError(
            f"--num_images: {_NUM_IMAGES.value}: --search={method} decides by itself "
            "how many: drop it"
        )
    steps = config.sample.eval_num_steps
    if _BUDGET.value < steps:
        raise UserError(
            f"--budget: {_BUDGET.value}: must be at least {steps}, the evaluations of "
            "one image"
        )
    row = METHODS[method]
    if row.by == "guidance":
        _check_rejection(config)
    if steps < row.fewest_steps:
        raise UserError(
            f"--num_steps: {steps}: --search={method} needs at least {row.fewest_steps}"
        )
    if row.by == "gradient" and _REWARD.value is None:
        raise not_one_of(
            "--reward",
            _score_name(config),
            noise_optimization.REWARDS,
            why=f"has no gradient, which --search={method} needs",
        )


def _check_rejection(config: ConfigDict) -> None:
    steps, judged = config.sample.eval_num_steps, _JUDGED_STEPS.value
    if config.eval.guidance_scale == 1.0:
        raise UserError(
            "--guidance_scale: 1.0: --search=cfg_rejection compares the model with and "
            "without the prompt: must be another one, such as 1.5"
        )
    if judged >= steps:
        raise UserError(
            f"--judged_steps: {judged}: must be below the {steps} steps of an image"
        )
    if not 0 < _KEEP.value <= 1:
        raise UserError(f"--keep: {_KEEP.value}: must be above 0, at most 1")


def _score_name(config: ConfigDict) -> str:
    return _REWARD.value or "+".join(config.reward)


def _judge(config: ConfigDict, prompts: Sequence[Prompt]) -> Judge | None:
    """Scores of images of a prompt (its number): --reward, or the config's reward.

    UserError if the config's reward cannot judge these prompts; None if that does not
    matter.
    """
    import jax.numpy as jnp

    from flowgrpo_jax import assemble

    if _REWARD.value is not None:
        smooth = noise_optimization.REWARDS[_REWARD.value]
        return lambda images, prompt: np.asarray(smooth(jnp.asarray(images)))
    reward = assemble.make_reward(config)
    try:
        known = assemble.judgeable(config, reward, prompts)
    except UserError:
        if METHODS[str(_SEARCH.value)].by == "guidance":
            return None
        raise
    return lambda images, prompt: reward(images, [known[prompt]] * len(images))["avg"]


def _prompts() -> list[Prompt]:
    prompts = []
    for text in _PROMPT.value:
        try:
            prompts.append(Prompt(checked(text)))
        except ValueError as error:
            raise UserError(f"--prompt: {ascii(text[:60])}: {error}") from error
    if _PROMPTS_FILE.value is not None:
        prompts += load_prompts(_PROMPTS_FILE.value, "--prompts_file")
    if not prompts:
        raise UserError("--prompt: missing: give one, or a file with --prompts_file")
    return prompts


if __name__ == "__main__":
    cli.run(main, FLAGS)
