"""Prompt sets as TensorFlow Datasets, prepared on first use, without TensorFlow.

A prompt set is generated once, written as array_record files in the TFDS layout
(`<data_dir>/geneval_prompts/<config>/<version>`) and read back from there, by us or
by any other tool that knows TFDS. The builder is in `tfds_builder`; it is imported
only when a set is loaded, because importing TFDS takes seconds.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from flowgrpo_jax.data import geneval_prompts
from flowgrpo_jax.data.geneval_grammar import COCO, Vocabulary
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError

SPLITS = ("train", "test")


@dataclass(frozen=True)
class PromptSet:
    """A reproducible description of a train and a test split of GenEval prompts.

    With `test_fraction` (task -> fraction) every prompt of the vocabulary is
    enumerated and split by content; without, the benchmark's sampling is used and
    `num_test` counts draws per task.
    """

    name: str
    vocabulary: Vocabulary
    num_train: int = 50_000
    num_test: int = geneval_prompts.TEST_NUM
    train_seed: int = 0
    test_seed: int = geneval_prompts.TEST_SEED
    test_fraction: Mapping[str, float | int] | None = None

    def generate(self, split: str) -> list[Prompt]:
        """The prompts of "train" or "test", from nothing but this description."""
        if split not in SPLITS:
            raise UserError(f"prompts: split {split}: must be one of {SPLITS}")
        if self.test_fraction is not None:
            train, test = geneval_prompts.enumerate_split(
                self.vocabulary, self.test_fraction
            )
            if split == "test":
                return test
            return geneval_prompts.train_list(train, self.num_train, self.train_seed)
        if split == "test":
            return geneval_prompts.generate(
                self.vocabulary, "test", self.num_test, self.test_seed
            )
        return geneval_prompts.generate(
            self.vocabulary, "train", self.num_train, self.train_seed
        )

    @property
    def config_name(self) -> str:
        """The name on disk: a changed description never reads another's files."""
        if PROMPT_SETS.get(self.name) == self:
            return self.name
        description = json.dumps(asdict(self), sort_keys=True, default=dict)
        return f"{self.name}-{hashlib.sha256(description.encode()).hexdigest()[:8]}"


PROMPT_SETS = {"coco": PromptSet("coco", COCO)}


def load(
    config: str | PromptSet, split: str, data_dir: str | Path | None = None
) -> list[Prompt]:
    """Reads a split, after preparing the whole set if this `data_dir` has it not.

    `config` is a name in PROMPT_SETS or a description; `data_dir` defaults to TFDS's.
    Preparation writes to a temporary folder and renames it, so a killed one leaves
    nothing that would be read.
    """
    if isinstance(config, str):
        if config not in PROMPT_SETS:
            raise UserError(f"prompts: {config}: must be one of {list(PROMPT_SETS)}")
        config = PROMPT_SETS[config]
    if split not in SPLITS:
        raise UserError(f"prompts: split {split}: must be one of {SPLITS}")
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
    except Exception as error:  # TFDS and its C++ say each damage otherwise
        root = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
        raise UserError(
            f"prompts: {config.name}: {root}/geneval_prompts/{config.config_name}: is "
            f"damaged ({' '.join(str(error).split())[:200]}): delete this folder, it "
            "will be made again"
        ) from error
