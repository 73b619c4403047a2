"""The reward "imagereward": ImageReward v1.0, BLIP with a head tuned on rankings.

Xu et al. 2023 (arXiv 2304.05977): the state of BLIP's first text token, which attends
to the image, goes through five linear layers; the result is normalised to mean 0 and
standard deviation 1 on the authors' images.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.encoders import blip
from flowgrpo_jax.models.encoders.blip import Blip, BlipConfig
from flowgrpo_jax.models.files import hub, tensors
from flowgrpo_jax.models.text import Reader
from flowgrpo_jax.rewards import clip_model, linear_head
from flowgrpo_jax.rewards.preprocess import Preprocess
from flowgrpo_jax.rewards.registry import Context
from flowgrpo_jax.rewards.scorer import Scorer

BERT = "google-bert/bert-base-uncased"
TOKENS = 35  # longer prompts are cut
MEAN, STD = 0.16717362830052426, 1.0333394966054072
# Heads of BLIP's pretraining, which ImageReward keeps and does not use.
IGNORE = (r".*position_ids", r"blip\.(text|vision)_proj\..*")


def make(
    context: Context,
    weights: str = "",
    tokenizer: str = BERT,
    dtype: str = "float32",
    microbatch: int = 16,
) -> Scorer:
    """`weights` is a .safetensors file; `tokenizer` is the folder or hub id of BERT's.

    The weights are published as a pickle, which is not read; docs/rewards.md converts it.
    """
    where = "reward_options.imagereward"
    if not weights:
        raise UserError(
            f"{where}.weights: must be a .safetensors file: docs/rewards.md says how to "
            "make it of ImageReward.pt"
        )
    clip_model.check_dtype(where, dtype)
    file = hub.files(f"{where}.weights", weights, ("*.safetensors",))
    folder = hub.files(f"{where}.tokenizer", tokenizer, clip_model.SMALL)
    words = clip_model.tokenizer(f"{where}.tokenizer", folder)
    return scorer(BlipConfig(dtype=jnp.dtype(dtype)), file, words, microbatch)


def scorer(config: BlipConfig, file: Path, words: Any, microbatch: int) -> Scorer:
    """The reward for a BLIP of any size; one file holds its weights and the head's."""
    network = Blip(config)
    table = [*blip.table("blip.", "blip/"), *linear_head.table("mlp.", "head/")]
    like = {"blip": blip.shapes(config), "head": linear_head.shapes(config.hidden_size)}
    params = jax.device_put(tensors.read(file, table, like, IGNORE))
    preprocess = Preprocess(config.vision.image_size)

    def score(params, images, text):
        ids, mask = text
        pixels = preprocess(images)
        states = network.apply({"params": params["blip"]}, pixels, ids, mask)
        return (linear_head.apply(params["head"], states[:, 0]) - MEAN) / STD

    def tokens(prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
        texts = [prompt.text for prompt in prompts]
        encoded = words(texts, padding="max_length", truncation=True, max_length=TOKENS)
        ids = np.asarray(encoded["input_ids"], np.int32)
        return ids, np.asarray(encoded["attention_mask"], bool)

    reader = Reader("BERT", TOKENS, words)
    return Scorer("imagereward", params, score, tokens, microbatch, reader=reader)
