"""The reward "pickscore": what people preferred, by a CLIP-H tuned on Pick-a-Pic.

Kirstain et al. 2023 (arXiv 2305.01569): exp(logit_scale) * cosine, which Flow-GRPO
divides by 26; usual pictures get 0.8 to 0.9.
"""

from flowgrpo_jax.rewards import clip_model
from flowgrpo_jax.rewards.registry import Context
from flowgrpo_jax.rewards.scorer import Scorer

WEIGHTS = "yuvalkirstain/PickScore_v1"
SCALE = 26.0


def make(
    context: Context,
    weights: str = WEIGHTS,
    processor: str | None = clip_model.CLIP_H,
    dtype: str = "float32",
    microbatch: int = 16,
) -> Scorer:
    """`weights` is a CLIPModel's folder or hub id, `processor` its tokenizer's."""
    clip = clip_model.load("pickscore", weights, processor, dtype)

    def score(params, images, ids):
        return clip.logits(params, images, ids) / SCALE

    return Scorer(
        "pickscore", clip.params, score, clip.ids, microbatch, reader=clip.reader
    )
