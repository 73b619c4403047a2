"""The reward "aesthetic": LAION's predictor, a linear head on CLIP ViT-L/14's image.

The image's unit vector goes through five linear layers. The score is not scaled: it
lies between about 1 and 10.
"""

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import hub
from flowgrpo_jax.rewards import clip_model, linear_head
from flowgrpo_jax.rewards.registry import Context
from flowgrpo_jax.rewards.scorer import Scorer


def make(
    context: Context,
    head: str = "",
    weights: str = clip_model.CLIP_L,
    processor: str | None = None,
    dtype: str = "float32",
    microbatch: int = 16,
) -> Scorer:
    """`head` is a .safetensors file; `weights` is a CLIPModel's folder or hub id.

    The head is published as a pickle, which is not read; docs/rewards.md converts it.
    """
    if not head:
        raise UserError(
            "reward_options.aesthetic.head: must be a .safetensors file: "
            "docs/rewards.md says how to make it of sac+logos+ava1-l14-linearMSE.pth"
        )
    clip = clip_model.load("aesthetic", weights, processor, dtype)
    file = hub.files("reward_options.aesthetic.head", head, ("*.safetensors",))
    width = clip.params["vision"]["visual_projection"]["kernel"].shape[-1]
    params = {"clip": clip.params, "head": linear_head.read(file, width)}

    def score(params, images, _):
        vectors = clip.embed_images(params["clip"], images)
        return linear_head.apply(params["head"], vectors)

    return Scorer("aesthetic", params, score, lambda prompts: None, microbatch)
