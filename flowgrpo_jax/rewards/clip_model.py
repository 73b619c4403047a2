"""The CLIP model of a reward: weights, tokenizer, preprocessing; rewards share them.

`weights` is a folder or hub id, or a .safetensors file; `processor` is the folder or hub
id that has the tokenizer and, for a single file, the configuration.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError, not_one_of
from flowgrpo_jax.models.encoders import clip_weights
from flowgrpo_jax.models.encoders.clip import CLIP
from flowgrpo_jax.models.files import hub
from flowgrpo_jax.models.text import Reader
from flowgrpo_jax.rewards.preprocess import Preprocess

CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
DTYPES = ("float32", "bfloat16")
SMALL = ("*.json", "merges.txt")
_WEIGHTS = ("model.safetensors", "model*.safetensors", "open_clip_model.safetensors")


@dataclasses.dataclass(frozen=True)
class ClipModel:
    """Both towers, with tokenizer and preprocessing; methods are pure in `params`."""

    network: CLIP
    params: Any
    preprocess: Preprocess
    tokenizer: Any

    def ids(self, prompts: Sequence[Prompt]) -> Int[np.ndarray, "prompt token"]:
        """Token ids of the prompts' texts; see `tokens`."""
        return self.tokens([prompt.text for prompt in prompts])

    def tokens(self, texts: Sequence[str]) -> Int[np.ndarray, "text token"]:
        """Token ids, cut and padded to the length of the text tower."""
        encoded = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.reader.limit,
        )
        return np.asarray(encoded["input_ids"], np.int32)

    @property
    def reader(self) -> Reader:
        """The text tower and its tokenizer."""
        length = self.network.config.text.max_position_embeddings
        return Reader("CLIP", length, self.tokenizer)

    def embed_images(
        self, params: Any, images: Float[Array, "image height width 3"]
    ) -> Float[Array, "image feature"]:
        """Unit vectors of images in [0, 1]."""
        bound = self.network.bind({"params": params})
        return bound.embed_images(self.preprocess(images))

    def logits(
        self,
        params: Any,
        images: Float[Array, "image height width 3"],
        ids: Int[Array, "image token"],
    ) -> Float[Array, " image"]:
        """exp(logit_scale) * cosine of every image in [0, 1] with its prompt."""
        bound = self.network.bind({"params": params})
        return bound(self.preprocess(images), ids)

    def cosine(
        self,
        params: Any,
        images: Float[Array, "image height width 3"],
        ids: Int[Array, "image token"],
    ) -> Float[Array, " image"]:
        """Cosine of every image in [0, 1] with its prompt."""
        scale = jnp.exp(params["logit_scale"].astype(jnp.float32))
        return self.logits(params, images, ids) / scale


def load(
    reward: str,
    weights: str,
    processor: str | None,
    dtype: str,
    fit: str = "",
    option: str = "weights",
) -> ClipModel:
    """The model that a reward's options name; a UserError names the option at fault.

    `option` is what the reward calls its option `weights`; `fit` is how a rectangle
    becomes a square, if not as the folder says. Parameters from the same files are
    shared by rewards, and by training and evaluation.
    """
    where = f"reward_options.{reward}"
    check_dtype(where, dtype)
    weights_path = folder = hub.files(f"{where}.{option}", weights, (*SMALL, *_WEIGHTS))
    if processor is not None:
        folder = hub.files(f"{where}.processor", processor, SMALL)
    elif weights_path.is_file():
        raise UserError(
            f"{where}.processor: a folder or hub id with the tokenizer and the "
            f"configuration of {weights} is needed"
        )
    network, params = _towers(weights_path, folder, dtype)
    theirs = clip_weights.is_open_clip(weights_path)
    steps = Preprocess.from_open_clip if theirs else Preprocess.from_folder
    preprocess = steps(folder, network.config.vision.image_size)
    if fit:
        preprocess = dataclasses.replace(preprocess, fit=fit)
    return ClipModel(
        network, params, preprocess, tokenizer(f"{where}.processor", folder)
    )


@functools.cache
def _towers(weights_path: Path, folder: Path, dtype: str) -> tuple[CLIP, Any]:
    """Network and parameters; `folder` holds the configuration of a single file."""
    as_type = jnp.dtype(dtype)
    if weights_path.is_file():
        network, params = clip_weights.read(folder, as_type, weights=weights_path)
    else:
        network, params = clip_weights.read(weights_path, as_type)
    return network, jax.device_put(params)


def check_dtype(where: str, dtype: str) -> None:
    """UserError for a dtype in which scores cannot be computed."""
    if dtype not in DTYPES:
        raise not_one_of(f"{where}.dtype", dtype, DTYPES)


def tokenizer(where: str, folder: Path) -> Any:
    """The folder's tokenizer through transformers; UserError if it has none."""
    from transformers import AutoTokenizer  # two seconds

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{where}: {folder}: no tokenizer in it ({reason})") from error
