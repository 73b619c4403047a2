"""A model that is there, as a library's user holds it: sample, evaluate, export."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from flowgrpo_jax.assemble import evaluation, exporting, restore, sizes, variants
from flowgrpo_jax.config import families
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.inference import sampling
from flowgrpo_jax.runtime.resolution import Size


class Policy:
    """The base model of a config, or what a run has made of it.

    `config` says how it is sampled and judged; `restored` holds the weights.
    """

    def __init__(self, config: ConfigDict, restored: restore.Restored):
        self.config, self.restored = config, restored

    def __repr__(self) -> str:
        return f"Policy({self.restored} of {self.config.model})"

    def sample(
        self,
        prompts: str | Sequence[str],
        seed: int = 0,
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Float[np.ndarray, "prompt height width 3"]:
        """One image in [0, 1] of every prompt; the same seed gives the same noise.

        Steps and guidance are the config's unless they are given. UserError for values
        that cannot be.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        config = variants.with_options(self.config, seed, guidance_scale, num_steps)
        pipeline, variables = restore.make_pipeline(config, self.restored, texts)
        return sampling.sample(pipeline, variables, len(texts), 1)[:, 0]

    def evaluate(self) -> dict[str, float]:
        """The scores of a run's final evaluation: `eval_...` by name."""
        return evaluation.evaluate(self.config, self.restored)

    def export(self, path: str | Path) -> list[Path]:
        """Write it as diffusers reads it: LoRA files, or the whole transformer.

        The files or folders that were written. UserError for the embedded model, which
        is no model of diffusers.
        """
        if families.of(self.config.model).embedded:
            raise UserError(
                f"model: {self.config.model}: the embedded model is no diffusers "
                "model: a run leaves it as weights.safetensors"
            )
        out = Path(path)
        out.mkdir(parents=True, exist_ok=True)
        whole = not self.config.train.use_lora
        return exporting.export(self.config, self.restored, out, whole)


def load(
    source: str | Path | ConfigDict,
    *,
    checkpoint: int | None = None,
    weights: str | None = None,
) -> Policy:
    """A policy from the workdir of a run, from a config, or from a model's name.

    Of a workdir the newest checkpoint unless `checkpoint` (finished iterations) is
    given, and of it the weights that the run evaluates unless `weights` says "ema" or
    "learner". UserError for what is not there.
    """
    given: Any = source
    if isinstance(given, ConfigDict):
        config = restore.choose_config(given, None)
        return Policy(config, restore.base(config, _sizes(config)))
    if (Path(given).expanduser() / "config.json").is_file():
        config = restore.choose_config(None, str(given))
        asked = _sizes(config)
        return Policy(config, restore.tuned(config, given, checkpoint, weights, asked))
    config = variants.model_config(str(given))
    return Policy(config, restore.base(config))


def _sizes(config: ConfigDict) -> Sequence[Size]:
    """What an evaluation will ask for; whoever only samples may lack its prompts."""
    try:
        return sizes.of_evaluation(config)
    except UserError:
        return ()
