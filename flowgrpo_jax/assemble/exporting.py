"""The result of a run as diffusers and PEFT read it, and its model card."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from flowgrpo_jax.assemble.restore import Restored
from flowgrpo_jax.config import families
from flowgrpo_jax.data.prompt_files import load_prompts
from flowgrpo_jax.inference import evaluator
from flowgrpo_jax.models.files import lora_files
from flowgrpo_jax.runtime.metrics import read_metrics

_EXAMPLES = 3


def export(
    config: ConfigDict,
    restored: Restored,
    out: Path,
    transformer: bool,
) -> list[Path]:
    """Write a `restore.Restored` to `out`; the files or folders."""
    code = families.of(config.model).code
    if transformer:
        path = out / "transformer"
        code.write_transformer(path, restored.variables, restored.model)
        return [path]
    adapter = code.adapter(restored.variables, restored.model)
    return [
        lora_files.write_diffusers(out, adapter),
        lora_files.write_peft(out / "peft", adapter, hub_id(config) or ""),
    ]


def hub_id(config: ConfigDict) -> str | None:
    """The hub id of the base model; None for a folder, which nobody else has."""
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
    restored: Restored,
    transformer: bool,
    grids: Sequence[Path] = (),
) -> str:
    """README.md: what was trained, from which prompts and rewards, and its scores.

    Of a `restore.Restored`. `grids`: images beside it, to be shown.
    """
    base = hub_id(config)
    named = f"base_model: {base}\n" if base else ""
    same = (
        "" if restored.differs else "\n**Nothing in it differs from the base model.**\n"
    )
    other = Path(config.transformer_path).name
    replaced = f"\n- Base model: the transformer of {other} in place of its own"
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
- Weights: {restored}, {_what(config, transformer)}{replaced if other else ""}
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
    rank, alpha = config.train.lora_rank, config.train.lora_alpha
    return (
        f"LoRA of rank {rank}, alpha {alpha:g} (the file\n"
        f"  says alpha {rank}: the rest of the strength is in its matrices)"
    )
