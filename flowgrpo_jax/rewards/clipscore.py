"""The reward "clipscore": agreement of image and prompt by CLIP ViT-L/14.

The score is exp(logit_scale) * cosine / 30, as in Flow-GRPO: a good picture gets
about 0.9.
"""

from flowgrpo_jax.rewards import clip_model
from flowgrpo_jax.rewards.registry import Context
from flowgrpo_jax.rewards.scorer import Scorer

SCALE = 30.0


def make(
    context: Context,
    weights: str = clip_model.CLIP_L,
    processor: str | None = None,
    dtype: str = "float32",
    microbatch: int = 16,
) -> Scorer:
    """`weights` and, where it has no tokenizer, `processor` are folders or hub ids."""
    clip = clip_model.load("clipscore", weights, processor, dtype)

    def score(params, images, ids):
        return clip.logits(params, images, ids) / SCALE

    return Scorer("clipscore", clip.params, score, clip.ids, microbatch)
