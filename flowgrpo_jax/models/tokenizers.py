"""Tokenizers of a diffusers folder, by way of transformers' fast ones."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from flowgrpo_jax.errors import UserError

# Class in transformers, and the sets of files that it can be read from. Without one of
# them transformers would make an empty vocabulary and say nothing.
_KINDS = {
    "clip": ("CLIPTokenizerFast", (("tokenizer.json",), ("vocab.json", "merges.txt"))),
    "t5": ("T5TokenizerFast", (("tokenizer.json",), ("spiece.model",))),
}


class Tokenizer:
    """Prompts to token ids of one length: start and end added, cut, padded.

    Args:
      folder: a tokenizer folder of a diffusers pipeline.
      kind: "clip" or "t5".
      length: tokens per prompt; by default the most that the tokenizer's encoder takes.

    UserError if the folder has no tokenizer of that kind.
    """

    def __init__(self, folder: str | Path, kind: str, length: int | None = None):
        name, choices = _KINDS[kind]
        folder = Path(folder)
        if not any(all((folder / file).is_file() for file in c) for c in choices):
            files = " or ".join(" with ".join(choice) for choice in choices)
            raise UserError(
                f"model: {folder}: no tokenizer: the folder must have {files}"
            )
        import transformers  # seconds that a run of the embedded model spares

        try:
            tokenizer = getattr(transformers, name).from_pretrained(
                str(folder), local_files_only=True
            )
        except Exception as error:  # tokenizers raises bare Exception on bad files
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"model: {folder}: the tokenizer cannot be read ({reason})"
            ) from error
        self._tokenizer = tokenizer
        self.length = length or tokenizer.model_max_length

    def __call__(self, prompts: Sequence[str]) -> Int[np.ndarray, "prompt token"]:
        """Ids [prompt, length], as diffusers' StableDiffusion3Pipeline makes them."""
        ids = self._tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_tensors="np",
        ).input_ids
        return ids.astype(np.int32)
