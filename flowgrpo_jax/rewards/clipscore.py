"""The reward "clipscore": agreement of image and prompt by CLIP ViT-L/14.

exp(logit_scale) * cosine / 30, as Flow-GRPO has it: about 0.9 for a good picture.
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
    """Options: folder or hub id of a CLIPModel, of its tokenizer if it has none."""
    clip = clip_model.load("clipscore", weights, processor, dtype)

    def score(params, images, ids):
        return clip.logits(params, images, ids) / SCALE

    return Scorer("clipscore", clip.params, score, clip.ids, microbatch)
