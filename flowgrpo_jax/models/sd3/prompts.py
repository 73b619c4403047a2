"""The three text encoders of SD3, in the life that all families give to theirs."""

import functools

from flowgrpo_jax.models.folder_encoders import FolderEncoders, TextNetworks
from flowgrpo_jax.models.sd3 import text


class SD3PromptEncoders(FolderEncoders):
    """CLIP-L, CLIP-G and T5 of a folder."""

    @property
    def networks(self) -> TextNetworks:
        return TextNetworks(
            text.SD3TextConfig.from_folder,
            text.SD3Text,
            text.shapes,
            text.read,
            _tokenizer,
        )


# Reading them takes a second, and every block of prompts asks.
_tokenizer = functools.lru_cache(1)(text.sd3_tokenizer)
