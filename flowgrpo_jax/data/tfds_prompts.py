"""Prompt sets as TensorFlow Datasets, prepared on first use, without TensorFlow.

A prompt set is generated once, written as array_record files in the TFDS layout
(`<data_dir>/geneval_prompts/<config>/<version>`) and read back from there, by us or
by any other tool that knows TFDS. The builder is in `tfds_builder`; it is imported
only when a set is loaded, because importing TFDS takes seconds.
"""

import os
from pathlib import Path

from flowgrpo_jax.data.prompt_sets import PROMPT_SETS, SPLITS, PromptSet
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError, not_one_of


def load(
    config: str | PromptSet, split: str, data_dir: str | Path | None = None
) -> list[Prompt]:
    """Reads a split; prepares the whole set first if `data_dir` does not have it.

    `config` is a name in PROMPT_SETS or a description; `data_dir` defaults to TFDS's.
    Preparation writes to a temporary folder and renames it, so one that was killed
    leaves nothing that would be read.
    """
    if isinstance(config, str):
        if config not in PROMPT_SETS:
            raise not_one_of("prompts", config, PROMPT_SETS)
        config = PROMPT_SETS[config]
    if split not in SPLITS:
        raise not_one_of("prompts", f"split {split}", SPLITS)
    try:
        from flowgrpo_jax.data import tfds_builder

        return tfds_builder.read(tfds_builder.prepared(config, data_dir), split)
    except OSError as error:
        place = error.filename or "~/tensorflow_datasets"
        raise UserError(
            f"prompts: {config.name}: {place}: {(error.strerror or str(error)).lower()}: "
            "prompt sets are kept there: set TFDS_DATA_DIR to a folder that can be "
            "written to"
        ) from error
    except (ImportError, UserError):
        raise
    except Exception as error:  # TFDS raises many types for damaged files
        root = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
        raise UserError(
            f"prompts: {config.name}: {root}/geneval_prompts/{config.config_name}: is "
            f"damaged ({' '.join(str(error).split())[:200]}): delete this folder, it "
            "will be written again"
        ) from error
