"""The reward "clipscore": agreement of image and prompt by a CLIP, by default ViT-L/14.

The score is exp(logit_scale) * cosine / 30, as in Flow-GRPO: a good picture gets
about 0.9. With `cosine` it is the cosine alone, as G2RPO and MixGRPO have it.
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
    cosine: bool = False,
) -> Scorer:
    """`weights` and, where it has no tokenizer, `processor` are folders or hub ids.

    `weights` may also be a .safetensors file, of transformers or of open_clip.
    """
    clip = clip_model.load("clipscore", weights, processor, dtype)

    def score(params, images, ids):
        if cosine:
            return clip.cosine(params, images, ids)
        return clip.logits(params, images, ids) / SCALE

    return Scorer(
        "clipscore", clip.params, score, clip.ids, microbatch, reader=clip.reader
    )
