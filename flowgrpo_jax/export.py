"""Exports the result of a run for diffusers and PEFT, with a model card.

python -m flowgrpo_jax.export --workdir=DIR --output=OUT                 LoRA files
python -m flowgrpo_jax.export --workdir=DIR --output=OUT --transformer   the whole network

LoRA: OUT/pytorch_lora_weights.safetensors for pipeline.load_lora_weights(OUT) and all
others who read such files (its alpha is its rank: docs/lora.md), and the folder OUT/peft
for PEFT. A transformer, any LoRA folded in, goes to OUT/transformer.
"""

from pathlib import Path

from absl import flags

from flowgrpo_jax import cli
from flowgrpo_jax.errors import UserError

FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", FLAGS)
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
    "Which weights of the run; by default those that it evaluates.",
    flag_values=FLAGS,
)
_MODEL = flags.DEFINE_string(
    "model", None, "Where the run's base model is now, if it has been moved.", FLAGS
)
_OUTPUT = flags.DEFINE_string("output", "export", "Folder for the files.", FLAGS)
_TRANSFORMER = flags.DEFINE_bool(
    "transformer", False, "Export the whole transformer, not the LoRA.", FLAGS
)


def main() -> None:
    from flowgrpo_jax.assemble import exporting, restore
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
    written = exporting.export(config, restored, out, transformer)
    grids = exporting.copy_grids(Path(workdir), out)
    card = exporting.model_card(config, Path(workdir), restored, transformer, grids)
    (out / "README.md").write_text(card)
    print("\n".join(str(path) for path in [*written, *grids, out / "README.md"]))
    print(f"of {restored}")


if __name__ == "__main__":
    cli.run(main, FLAGS)
