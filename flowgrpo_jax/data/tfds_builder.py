"""The TFDS builder of GenEval prompts; import it lazily, since TFDS imports slowly."""

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from flowgrpo_jax.data.prompt_sets import PROMPT_SETS, SPLITS, PromptSet
from flowgrpo_jax.data.prompts import Prompt


@dataclass
class GenevalPromptsConfig(tfds.core.BuilderConfig):
    """A TFDS configuration that carries the whole description of a prompt set."""

    prompt_set: PromptSet = PROMPT_SETS["coco"]

    @classmethod
    def of(cls, prompt_set: PromptSet) -> "GenevalPromptsConfig":
        return cls(name=prompt_set.config_name, prompt_set=prompt_set)


class GenevalPrompts(tfds.core.GeneratorBasedBuilder):
    """GenEval prompts (arXiv 2310.11513) with the records that rewards read."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar[list[GenevalPromptsConfig]] = [
        GenevalPromptsConfig.of(prompt_set) for prompt_set in PROMPT_SETS.values()
    ]
    # Nothing is downloaded, so there are no files of checksums beside this code. TFDS
    # 4.9.10 would look for them with importlib_resources, which it does not install.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        # Not dataset_info_from_configs: it wants a folder of metadata per builder.
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "prompt": tfds.features.Text(),
                    "tag": tfds.features.Text(),
                    "metadata": tfds.features.Text(),
                    "index": np.int64,
                }
            ),
            disable_shuffling=True,  # keeps the order of generation
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Any]:
        prompt_set = self.builder_config.prompt_set
        return {
            split: self._generate_examples(prompt_set.generate(split))
            for split in SPLITS
        }

    def _generate_examples(
        self, prompts: list[Prompt]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for position, prompt in enumerate(prompts):
            yield (
                position,
                {
                    "prompt": prompt.text,
                    "tag": prompt.metadata["tag"],
                    "metadata": json.dumps(prompt.metadata),
                    "index": prompt.index,
                },
            )


def prepared(prompt_set: PromptSet, data_dir: str | Path | None) -> GenevalPrompts:
    """The builder of a set, whose files are written first if they are not there."""

    def builder() -> GenevalPrompts:
        config = GenevalPromptsConfig.of(prompt_set)
        return GenevalPrompts(
            config=GenevalPrompts.builder_configs.get(config.name, config),
            data_dir=data_dir,
            file_format="array_record",
        )

    result = builder()
    if not Path(result.data_dir).exists():
        print(f"preparing {prompt_set.name} prompts in {result.data_dir}")
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints about downloads
            result.download_and_prepare()
    except OSError:
        # Another process may have moved its finished copy there first.
        if not Path(result.data_dir).exists():
            raise
        result = builder()
    return result


def read(builder: GenevalPrompts, split: str) -> list[Prompt]:
    """All prompts of a split, in the order in which they were generated."""
    source = builder.as_data_source(split)
    return [
        Prompt(
            text=row["prompt"].decode(),  # TFDS gives text back as bytes
            metadata=json.loads(row["metadata"]),
            index=int(row["index"]),
        )
        for row in source.__getitems__(list(range(len(source))))
    ]
