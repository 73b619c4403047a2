"""Tokenizers of a diffusers folder, by way of transformers' fast ones."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import config_json
from flowgrpo_jax.models.text import Reader

# Class in transformers, and the sets of files that it can be read from. Without one of
# them transformers would make an empty vocabulary and say nothing.
_KINDS = {
    "clip": ("CLIPTokenizerFast", (("tokenizer.json",), ("vocab.json", "merges.txt"))),
    "t5": ("T5TokenizerFast", (("tokenizer.json",), ("spiece.model",))),
}

_AT_ONCE = 4096  # texts; their tokens take memory until they are counted


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

    def reader(self, encoder: str) -> Reader:
        """The encoder of that name, which takes these tokens."""
        return Reader(encoder, self.length, self._tokenizer)


def longer(tokenizer: Any, texts: Sequence[str], length: int) -> dict[str, int]:
    """The texts of more than `length` tokens, start and end included, and how many.

    `tokenizer` is one of transformers. What is short enough whatever its words is not
    tokenized: a character of ASCII makes at most one token, and two are added around
    them.
    """
    suspects = [text for text in texts if len(text) + 2 > length or not text.isascii()]
    found: dict[str, int] = {}
    for start in range(0, len(suspects), _AT_ONCE):
        part = suspects[start : start + _AT_ONCE]
        ids = tokenizer(part, verbose=False, return_attention_mask=False).input_ids
        counts = map(len, ids)
        found |= {text: n for text, n in zip(part, counts, strict=True) if n > length}
    return found


def identity(tokenizer: Any) -> str | int:
    """Equal for tokenizers that make the same tokens, however they cut and pad them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return id(tokenizer)
    told = json.loads(backend.to_str())
    rest = {key: told[key] for key in told if key not in ("padding", "truncation")}
    return json.dumps(rest, sort_keys=True)


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
