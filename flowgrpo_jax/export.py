"""The result of a run as diffusers and PEFT read it, with a model card.

python -m flowgrpo_jax.export --workdir=DIR --output=OUT                 LoRA files
python -m flowgrpo_jax.export --workdir=DIR --output=OUT --transformer   the whole network

LoRA: OUT/pytorch_lora_weights.safetensors for pipeline.load_lora_weights(OUT), and the
PEFT folder OUT/peft. A transformer, any LoRA folded in, goes to OUT/transformer.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from flowgrpo_jax import cli
from flowgrpo_jax.data.prompt_files import load_prompts
from flowgrpo_jax.errors import UserError

FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string("workdir", None, "The run.", FLAGS)
_CHECKPOINT = flags.DEFINE_integer(
    "checkpoint", None, "Iterations done; default the newest.", flag_values=FLAGS
)
_WEIGHTS = flags.DEFINE_enum(
    "weights",
    None,
    ["ema", "learner"],
    "Default what the run evaluates.",
    flag_values=FLAGS,
)
_MODEL = flags.DEFINE_string("model", None, "Where its base model is now.", FLAGS)
_OUTPUT = flags.DEFINE_string("output", "export", "Folder of the files.", FLAGS)
_TRANSFORMER = flags.DEFINE_bool(
    "transformer", False, "The whole transformer, not the LoRA.", FLAGS
)
_FOLD_ALPHA = flags.DEFINE_bool(
    "fold_alpha",
    False,
    "For readers that ignore the file's metadata: alpha = rank, the rest in B.",
    FLAGS,
)
_EXAMPLES = 3


def main() -> None:
    from flowgrpo_jax.assemble import restore
    from flowgrpo_jax.config import families

    workdir = _WORKDIR.value
    config = restore.choose_config(None, workdir, _MODEL.value)
    assert workdir is not None  # choose_config says so
    if families.of(config.model).embedded:
        raise UserError(
            f"model: {config.model}: the embedded model is no diffusers model: its "
            f"result is {workdir}/weights.safetensors"
        )
    out = cli.writable_folder(Path(_OUTPUT.value), "--output")
    restored = restore.tuned(config, workdir, _CHECKPOINT.value, _WEIGHTS.value)
    restored.warn()
    transformer = _TRANSFORMER.value or not config.train.use_lora
    written = export(config, restored, out, transformer, _FOLD_ALPHA.value)
    grids = copy_grids(Path(workdir), out)
    card = model_card(config, Path(workdir), restored, transformer, grids)
    (out / "README.md").write_text(card)
    print("\n".join(str(path) for path in [*written, *grids, out / "README.md"]))
    print(f"of {restored}")


def export(
    config: ConfigDict, restored, out: Path, transformer: bool, fold_alpha: bool = False
) -> list[Path]:
    """Write a `restore.Restored` to `out`; the files or folders."""
    from flowgrpo_jax.config import families
    from flowgrpo_jax.models.files import lora_files

    code = families.of(config.model).code
    if transformer:
        path = out / "transformer"
        code.write_transformer(path, restored.variables, restored.model)
        return [path]
    adapter = code.adapter(restored.variables, restored.model)
    if fold_alpha:
        adapter = adapter.folded()
    return [
        lora_files.write_diffusers(out, adapter),
        lora_files.write_peft(out / "peft", adapter, hub_id(config) or ""),
    ]


def hub_id(config: ConfigDict) -> str | None:
    """The hub id of the base model; None for a folder, which nobody else has."""
    from flowgrpo_jax.config import families

    name = families.of(config.model).aliases.get(config.model, config.model)
    owner, _, rest = name.partition("/")
    folder = Path(name).is_dir() or owner in ("", "~", ".", "..") or "/" in rest
    return None if folder or not rest else name


def copy_grids(workdir: Path, out: Path) -> list[Path]:
    """The first and the last contact sheet of the run: before.png, after.png."""
    sheets = sorted((workdir / "samples").glob("iteration_*.png"))
    ends = zip(("before", "after"), (sheets[:1] + sheets[1:][-1:]), strict=False)
    return [Path(shutil.copy(sheet, out / f"{name}.png")) for name, sheet in ends]


def model_card(
    config: ConfigDict,
    workdir: Path,
    restored,
    transformer: bool,
    grids: Sequence[Path] = (),
) -> str:
    """README.md: what was trained, from which prompts and rewards, and its scores.

    Of a `restore.Restored`. `grids`: images beside it, to be shown.
    """
    from flowgrpo_jax.config import families
    from flowgrpo_jax.inference import evaluator
    from flowgrpo_jax.runtime.metrics import read_metrics

    base = hub_id(config)
    named = f"base_model: {base}\n" if base else ""
    same = (
        "" if restored.differs else "\n**Nothing in it differs from the base model.**\n"
    )
    rewards = ", ".join(
        f"{name} ({weight:g})" for name, weight in config.reward.items()
    )
    scores = [row for row in read_metrics(workdir) if row["kind"] == "eval"]
    table = evaluator.table(scores[0], scores[-1]) if scores else "none measured"
    shown = "\n\n".join(f"![{path.stem}]({path.name})" for path in grids)
    return f"""---
{named}library_name: diffusers
tags: [text-to-image, reinforcement-learning, flow-grpo]
---
# {workdir.name}: {config.recipe}{f" on {base}" if base else ""}
{same}
Tuned with flowgrpo_jax for {restored.checkpoint} iterations of
{config.prompts_per_iteration} prompts x {config.group_size} images at
{config.resolution or "the model's own"} pixels.

- Rewards: {rewards}
- Prompts: {_told(config.prompts)}; scores on {Path(config.eval.prompts).name}
- Weights: {restored}, {_what(config, transformer)}
- Sampling in the scores: {config.sample.eval_num_steps} steps, guidance
  {config.eval.guidance_scale:g}

## Use

```python
{families.of(config.model).code.usage(base, transformer)}
```

## Scores, before and after

```
{table}
```

## Samples, before and after

Held-out prompts, the same noise.

{shown or "None were kept."}
"""


def _told(prompts: str) -> str:
    """A prompt set, or the name of a file and how its prompts begin."""
    path = Path(prompts)
    if not path.is_file():
        return path.name
    first = load_prompts(path)[:_EXAMPLES]
    return f"{path.name} (such as: {'; '.join(prompt.text for prompt in first)})"


def _what(config: ConfigDict, transformer: bool) -> str:
    if transformer:
        return "the whole transformer"
    return f"LoRA of rank {config.train.lora_rank}, alpha {config.train.lora_alpha:g}"


if __name__ == "__main__":
    cli.run(main, FLAGS)
