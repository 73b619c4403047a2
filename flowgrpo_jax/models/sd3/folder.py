"""What the model_index.json of a folder of Stable Diffusion 3 must say."""

from pathlib import Path

from flowgrpo_jax.models.files import config_json, pipeline_index
from flowgrpo_jax.models.files.pipeline_index import INDEX

_PIPELINES = tuple(
    f"StableDiffusion3{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint")
)
_CLIP = ("CLIPTextModelWithProjection",)
_CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_PARTS: dict[str, tuple[str | None, ...]] = {
    "transformer": ("SD3Transformer2DModel",),
    "vae": ("AutoencoderKL",),
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
    "text_encoder": _CLIP,
    "text_encoder_2": _CLIP,
    "text_encoder_3": ("T5EncoderModel", None),
    "tokenizer": _CLIP_TOKENIZERS,
    "tokenizer_2": _CLIP_TOKENIZERS,
    "tokenizer_3": ("T5Tokenizer", "T5TokenizerFast", None),
}
# Of image prompts, which nothing here gives.
_UNUSED = ("image_encoder", "feature_extractor")


def check_index(folder: Path) -> None:
    """UserError, naming the part, for a pipeline that is not the one implemented."""
    pipeline_index.check(folder, _PIPELINES, _PARTS, _UNUSED)


def has_t5(folder: Path) -> bool:
    """Whether the pipeline has a third text encoder; without, diffusers gives zeros."""
    entry = config_json.read(folder, INDEX).get("text_encoder_3")
    return isinstance(entry, list) and len(entry) == 2 and bool(entry[1])
