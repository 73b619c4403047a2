"""The two text encoders of FLUX.1, in the life that all families give to theirs."""

import functools

from flowgrpo_jax.models.flux import text
from flowgrpo_jax.models.folder_encoders import FolderEncoders, TextNetworks


class FluxPromptEncoders(FolderEncoders):
    """CLIP-L and T5 of a folder."""

    @property
    def networks(self) -> TextNetworks:
        return TextNetworks(
            text.FluxTextConfig.from_folder,
            text.FluxText,
            text.shapes,
            text.read,
            _tokenizer,
        )


# Reading them takes a second, and every block of prompts asks.
_tokenizer = functools.lru_cache(1)(text.flux_tokenizer)
