"""Stable Diffusion 3 as a FlowModel: from a diffusers folder, and back to one."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models import lora as loras
from flowgrpo_jax.models import vae
from flowgrpo_jax.models.files import lora_files, lora_reading, tensors
from flowgrpo_jax.models.flow_model import FlowModel, Shift, Variables, overlay
from flowgrpo_jax.models.sd3 import folder as sd3_folder
from flowgrpo_jax.models.sd3 import presets, transformer_config
from flowgrpo_jax.models.sd3 import text as sd3_text
from flowgrpo_jax.models.sd3.transformer import MMDiT, MMDiTConfig
from flowgrpo_jax.models.text import TextEmbedding

# The VAE of all released models, from their vae/config.json.
_VAE = vae.VAEConfig(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=16,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
# Read by itself: the transformer does not learn it.
_POSITIONS = (r"pos_embed\.pos_embed",)


@dataclasses.dataclass(frozen=True)
class PromptEncoders:
    """The text encoders of a folder; they are in memory only while `encoding`."""

    folder: str
    max_sequence_length: int  # tokens for T5
    dtype: str  # of their weights and of the embeddings

    def key(self) -> dict[str, Any]:
        """What determines an embedding, beside the prompt and the `files`."""
        return {"t5_tokens": self.max_sequence_length, "dtype": self.dtype}

    def files(self) -> list[Path]:
        """Weights and configurations of encoders and tokenizers."""
        found = [
            path
            for part in ("text_encoder", "tokenizer")
            for path in Path(self.folder).glob(f"{part}*/*")
            if path.is_file()
        ]
        return sorted(found)

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of the parts of an embedding, without the prompt axis."""
        config = self._config()
        tokens = 2 * sd3_text.CLIP_TOKENS + self.max_sequence_length
        network, params = sd3_text.SD3Text(config), sd3_text.shapes(config)
        ids = jax.ShapeDtypeStruct((1, tokens), np.dtype(np.int32))
        found = jax.eval_shape(
            lambda params, ids: vars(network.apply({"params": params}, ids)),
            params,
            ids,
        )
        return {
            name: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
            for name, leaf in found.items()
        }

    def encoding(self) -> Callable[[Sequence[str]], TextEmbedding]:
        """Loads the encoders; what it returns embeds prompts and holds them."""
        config = self._config()
        tokenize = self._tokenizer()
        tokenize.check(config)
        like = sd3_text.shapes(config)
        params = jax.device_put(sd3_text.read(self.folder, like))
        run = jax.jit(sd3_text.SD3Text(config).apply)

        def encode(texts):
            ids = jax.device_put(tokenize(texts))
            return jax.device_get(run({"params": params}, ids))

        return encode

    def cut(self, texts: Sequence[str]) -> dict[str, list[str]]:
        """The texts of which an encoder does not see the end, by that encoder."""
        return self._tokenizer().cut(texts)

    def _tokenizer(self) -> sd3_text.SD3Tokenizer:
        return _tokenizer(self.folder, self.max_sequence_length)

    def _config(self) -> sd3_text.SD3TextConfig:
        config = sd3_text.SD3TextConfig.from_folder(self.folder)
        return config.with_dtype(jnp.dtype(self.dtype))


@functools.lru_cache(1)
def _tokenizer(folder: str, max_sequence_length: int) -> sd3_text.SD3Tokenizer:
    return sd3_text.SD3Tokenizer(folder, max_sequence_length)


def make_model(
    name: str,
    folder: Path | None,
    resolution: int = 0,
    max_sequence_length: int = sd3_text.MAX_SEQUENCE_LENGTH,
    lora_rank: int = 0,
    lora_alpha: float = 0.0,
    dtype: DTypeLike = jnp.float32,
) -> FlowModel:
    """The networks that a folder describes, without weights.

    Without a folder `name` is one of `presets.TRANSFORMERS`, as it was released.
    `resolution`: pixels along a side; 0 is what the transformer was trained at.
    """
    if folder is None:
        config = MMDiTConfig.from_dict(presets.TRANSFORMERS[name])
        coder, prompts = _VAE, None
    else:
        sd3_folder.check_index(folder)
        config = MMDiTConfig.from_folder(folder / "transformer")
        coder = vae.VAEConfig.from_folder(folder / "vae")
        kind = jnp.dtype(dtype).name
        prompts = PromptEncoders(str(folder), max_sequence_length, kind)
    _check_latents(config, coder, folder)
    side = _latent_side(config, coder, resolution)
    patches = side // config.patch_size
    config = dataclasses.replace(
        config,
        position_crop=(patches, patches),
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        dtype=dtype,
    )
    return FlowModel(
        name=name,
        config=config,
        autoencoder=vae.VAE(coder),
        latent_shape=(side, side, config.in_channels),
        prompts=prompts,
        shift=Shift() if folder is None else sd3_folder.shift(folder, patches**2),
    )


def _check_latents(
    config: MMDiTConfig, coder: vae.VAEConfig, folder: Path | None
) -> None:
    """UserError for a transformer and an autoencoder that do not fit together."""
    sides = config.in_channels, config.out_channels
    if sides != (coder.latent_channels,) * 2:
        raise UserError(
            f"model: {folder}: transformer/config.json: in_channels and out_channels: "
            f"{sides[0]} and {sides[1]}: latents of the vae have {coder.latent_channels}"
        )
    if (coder.in_channels, coder.out_channels) != (3, 3):
        raise UserError(
            f"model: {folder}: vae/config.json: in_channels and out_channels: must be 3"
        )


def _latent_side(config: MMDiTConfig, coder: vae.VAEConfig, resolution: int) -> int:
    step = coder.downscale * config.patch_size
    most = config.pos_embed_max_size * step
    own = config.sample_size * coder.downscale
    if resolution % step or resolution > most:
        raise UserError(
            f"resolution: {resolution}: must be 0 (the model's own, {own}) or a "
            f"multiple of {step}, at most {most}"
        )
    return (resolution or own) // coder.downscale


def shapes(model: FlowModel, weights: DTypeLike) -> Variables:
    """Shapes of all variables; `weights` is the type of the transformer's."""
    config = dataclasses.replace(model.config, lora_rank=0)
    latents = jnp.zeros((1, *model.latent_shape))
    network, coder = MMDiT(config), model.autoencoder
    assert isinstance(coder, vae.VAE)
    found = jax.eval_shape(
        network.init,
        jax.random.key(0),
        latents,
        jnp.ones(1),
        jnp.zeros((1, 1, config.joint_attention_dim)),
        jnp.zeros((1, config.pooled_projection_dim)),
    )
    return {
        "transformer": jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(weights)),
            found["params"],
        ),
        "buffers": found["buffers"],
        "vae": coder.shapes(),
    }


def read(folder: Path, model: FlowModel, like: Variables) -> Variables:
    """The variables of a folder, in the types and at the places of `like`."""
    table, network = transformer_config.table(model.config), folder / "transformer"
    return {
        "transformer": tensors.read(network, table, like["transformer"], _POSITIONS),
        "buffers": tensors.read(network, table, like["buffers"], (".*",)),
        "vae": tensors.read(folder / "vae", vae.TABLE, like["vae"]),
    }


def adapter(variables: Variables, model: FlowModel) -> lora_files.Adapter:
    """The LoRA of a policy, under the names of diffusers."""
    table, alpha = transformer_config.table(model.config), model.config.lora_alpha
    return lora_files.from_variables(jax.device_get(variables["lora"]), table, alpha)


def with_adapter(path: str, lora: Variables, model: FlowModel) -> Variables:
    """A `lora` tree like this one, with the weights of a LoRA file or PEFT folder."""
    table, alpha = transformer_config.table(model.config), model.config.lora_alpha
    return lora_files.to_variables(lora_reading.read(path), lora, table, alpha)


def write_transformer(folder: Path, variables: Variables, model: FlowModel) -> None:
    """The transformer as a diffusers folder, any LoRA folded in."""
    config = model.config
    host = loras.fold(jax.device_get(variables), config.lora_alpha)["transformer"]
    table, size = transformer_config.table(config), config.pos_embed_max_size
    whole = jax.ShapeDtypeStruct((size, size, config.width), np.dtype(np.float32))
    # Here is a crop of the positional table: all of it is in the base model.
    base = Path(model.prompts.folder) / "transformer"
    positions = tensors.read(base, table, {"pos_embed": {"table": whole}}, (".*",))
    tensors.write(folder, overlay(host, positions), table, _config_json(config))


def _config_json(config: MMDiTConfig) -> dict[str, Any]:
    """config.json of diffusers' SD3Transformer2DModel."""
    names = transformer_config.file_fields()
    values = {name: getattr(config, name) for name in names}
    values["dual_attention_layers"] = list(config.dual_attention_layers)
    return {"_class_name": "SD3Transformer2DModel", **values} | {
        "caption_projection_dim": config.width
    }
