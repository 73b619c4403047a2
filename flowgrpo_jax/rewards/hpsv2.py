"""The reward "hpsv2": Human Preference Score v2.1, a tuned CLIP ViT-H/14 of open_clip.

Wu et al. 2023 (arXiv 2306.09341): the cosine of image and prompt, 0.2 to 0.4. Images
that are not square get black bars, so that nothing is cut off.
"""

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards import clip_model
from flowgrpo_jax.rewards.registry import Context
from flowgrpo_jax.rewards.scorer import Scorer


def make(
    context: Context,
    weights: str = "",
    processor: str | None = clip_model.CLIP_H,
    dtype: str = "float32",
    microbatch: int = 16,
) -> Scorer:
    """`weights` is a .safetensors file of open_clip, `processor` has its configuration.

    HPS is published as a pickle, which is not read; docs/rewards.md converts it.
    """
    if not weights:
        raise UserError(
            "reward_options.hpsv2.weights: must be a .safetensors file: docs/rewards.md "
            "says how to make it of HPS_v2.1_compressed.pt"
        )
    clip = clip_model.load("hpsv2", weights, processor, dtype, fit="pad")
    return Scorer(
        "hpsv2", clip.params, clip.cosine, clip.ids, microbatch, reader=clip.reader
    )
