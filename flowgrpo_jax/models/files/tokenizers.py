"""Tokenizers of a diffusers folder, by way of transformers' fast ones."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import config_json

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
        _check_files(folder)
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
        self.folder, self.kind = folder, kind
        self.size = len(tokenizer)  # ids are below it
        self.model_max_length = tokenizer.model_max_length
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

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that have more tokens than `length`, start and end included."""
        ids = self._tokenizer(list(prompts), verbose=False).input_ids
        return [
            prompt
            for prompt, tokens in zip(prompts, ids, strict=True)
            if len(tokens) > self.length
        ]


def _check_files(folder: Path) -> None:
    """UserError, naming the file, for what transformers would tell less of."""
    for path in sorted(file for file in folder.iterdir() if file.is_file()):
        if path.suffix == ".json":
            config_json.load(path)
        with path.open("rb") as stream:
            if config_json.is_pointer(stream.read(100)):
                raise UserError(f"model: {path}: {config_json.POINTER}")
    alone = not (folder / "tokenizer.json").is_file()
    piece = folder / "spiece.model"
    if alone and piece.is_file() and not importlib.util.find_spec("sentencepiece"):
        raise UserError(
            f"model: {piece}: without a tokenizer.json beside it sentencepiece is "
            "needed: pip install sentencepiece"
        )
