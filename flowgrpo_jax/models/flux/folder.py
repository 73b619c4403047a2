"""What the model_index.json of a folder of FLUX.1 must say."""

from pathlib import Path

from flowgrpo_jax.models.files import pipeline_index

_PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
_PARTS: dict[str, tuple[str | None, ...]] = {
    "transformer": ("FluxTransformer2DModel",),
    "vae": ("AutoencoderKL",),
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("T5EncoderModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("T5Tokenizer", "T5TokenizerFast"),
}
# Of image prompts, which nothing here gives.
_UNUSED = ("image_encoder", "feature_extractor")


def check_index(folder: Path) -> None:
    """UserError, naming the part, for a pipeline that is not the one implemented."""
    pipeline_index.check(folder, _PIPELINES, _PARTS, _UNUSED)
