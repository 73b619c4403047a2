"""GenEval prompt sets by name: descriptions from which a split can be generated."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from flowgrpo_jax.data import geneval_prompts
from flowgrpo_jax.data.geneval_grammar import COCO, Vocabulary
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import not_one_of

SPLITS = ("train", "test")


@dataclass(frozen=True)
class PromptSet:
    """A reproducible description of a train and a test split of GenEval prompts.

    With `test_fraction` (task -> fraction) all prompts of the vocabulary are enumerated
    and split by content. Without it they are sampled as the benchmark does, with
    `num_test` draws per task.
    """

    name: str
    vocabulary: Vocabulary
    num_train: int = 50_000
    num_test: int = geneval_prompts.TEST_NUM
    train_seed: int = 0
    test_seed: int = geneval_prompts.TEST_SEED
    test_fraction: Mapping[str, float | int] | None = None

    def generate(self, split: str) -> list[Prompt]:
        """The prompts of "train" or "test", determined by this description alone."""
        if split not in SPLITS:
            raise not_one_of("prompts", f"split {split}", SPLITS)
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
        """The name on disk; a changed description has another name and other files."""
        if PROMPT_SETS.get(self.name) == self:
            return self.name
        description = json.dumps(asdict(self), sort_keys=True, default=dict)
        return f"{self.name}-{hashlib.sha256(description.encode()).hexdigest()[:8]}"


PROMPT_SETS = {"coco": PromptSet("coco", COCO)}
