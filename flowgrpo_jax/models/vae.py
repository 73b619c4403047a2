"""The autoencoder of latent diffusion: diffusers' `AutoencoderKL`, channels last.

A convolutional encoder gives mean and log-variance of the latents, a decoder the image
(Rombach et al. 2022, arXiv 2112.10752). Module names follow diffusers' tensor names.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import config_json
from flowgrpo_jax.models.files.tensors import Rule
from flowgrpo_jax.models.operations import vae_decode

Images = Float[Array, "sample height width channel"]
Latents = Float[Array, "sample row column latent"]
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Fields of diffusers' vae/config.json with the defaults of its class."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    dtype: DTypeLike = jnp.float32  # convolutions; norm statistics stay in fp32

    @classmethod
    def from_dict(
        cls, values: dict[str, Any], where: str = "model: vae/config.json"
    ) -> "VAEConfig":
        """From the keys of vae/config.json; UserError for what is not implemented."""
        supported: dict[str, tuple] = {
            "_class_name": ("AutoencoderKL",),
            "act_fn": ("silu",),
            "latents_mean": (None,),
            "latents_std": (None,),
        }
        # How many blocks there are is told by their widths.
        rest = {key: value for key, value in values.items() if key not in _BLOCK_TYPES}
        config = config_json.build(cls, rest, supported, where, _HARMLESS)
        count = len(config.block_out_channels)
        blocks = {key: ([kind] * count,) for key, kind in _BLOCK_TYPES.items()}
        config_json.check_known(values, blocks, values.keys(), where)
        groups = config.norm_num_groups
        if not count or any(n < 1 or n % groups for n in config.block_out_channels):
            raise UserError(
                f"{where}: block_out_channels: {list(config.block_out_channels)}: must "
                f"be multiples of norm_num_groups, {groups}"
            )
        if not config.scaling_factor > 0:
            raise UserError(
                f"{where}: scaling_factor: {config.scaling_factor:g}: must be above 0"
            )
        return config

    @classmethod
    def from_folder(cls, folder: str | Path) -> "VAEConfig":
        """From the vae folder of a diffusers pipeline."""
        values = config_json.read(folder)
        return cls.from_dict(values, f"model: {Path(folder) / 'config.json'}")

    @property
    def downscale(self) -> int:
        """Pixels along one side of what becomes one latent pixel."""
        return 2 ** (len(self.block_out_channels) - 1)


# Of every Stable Diffusion 3 and 3.5: 83.8 million parameters.
SD3 = VAEConfig(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=16,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
# Of FLUX.1: the same network, other numbers around it.
FLUX = dataclasses.replace(SD3, scaling_factor=0.3611, shift_factor=0.1159)
_HARMLESS = ("sample_size", "force_upcast")  # of training, and of fp16 decoding
_BLOCK_TYPES = {
    "down_block_types": "DownEncoderBlock2D",
    "up_block_types": "UpDecoderBlock2D",
}


@dataclasses.dataclass(frozen=True)
class VAE:
    """Images in [0, 1] to scaled latents and back, as pure functions of the weights."""

    config: VAEConfig

    @property
    def downscale(self) -> int:
        return self.config.downscale

    def encode(
        self, params: Params, images: Images, key: Array | None = None
    ) -> Latents:
        """The mean of the posterior in fp32, or with `key` a sample of it.

        UserError if the image is not a whole number of latent pixels.
        """
        cfg = self.config
        height, width = images.shape[1:3]
        if height % cfg.downscale or width % cfg.downscale:
            raise UserError(
                f"resolution: {height}x{width}: height and width must be multiples of "
                f"{cfg.downscale}"
            )
        moments = self._apply(params, 2.0 * images - 1.0, "encode")
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        if key is not None:
            deviation = jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))
            mean = mean + deviation * jax.random.normal(key, mean.shape)
        return (mean - (cfg.shift_factor or 0.0)) * cfg.scaling_factor

    def decode(self, params: Params, latents: Latents) -> Images:
        """fp32, clipped to [0, 1] as diffusers clips it."""
        cfg = self.config
        latents = latents / cfg.scaling_factor + (cfg.shift_factor or 0.0)
        images = self._apply(params, latents, "decode")
        return jnp.clip(0.5 * images + 0.5, 0.0, 1.0)

    def decode_operations(self, rows: int, columns: int) -> float:
        """Floating-point operations of decoding a latent of this size."""
        return vae_decode(
            rows,
            columns,
            latent_channels=self.config.latent_channels,
            widths=self.config.block_out_channels,
            layers=self.config.layers_per_block,
        )

    def _apply(self, params: Params, inputs: Array, method: str) -> Array:
        module = AutoencoderKL(self.config)
        return jnp.asarray(module.apply({"params": params}, inputs, method=method))

    def shapes(self) -> Params:
        """The tree of parameters as fp32 `jax.ShapeDtypeStruct`s."""
        pixels = jnp.zeros((1, *(self.config.downscale,) * 2, self.config.in_channels))
        init = AutoencoderKL(self.config).init
        return jax.eval_shape(init, jax.random.key(0), pixels)["params"]


class AutoencoderKL(nn.Module):
    """The two networks, on pixels in [-1, 1] and latents that are not scaled."""

    config: VAEConfig

    def setup(self):
        cfg = self.config
        self.encoder = _Encoder(cfg)
        self.decoder = _Decoder(cfg)
        if cfg.use_quant_conv:
            self.quant_conv = _conv(cfg, 2 * cfg.latent_channels, size=1)
        if cfg.use_post_quant_conv:
            self.post_quant_conv = _conv(cfg, cfg.latent_channels, size=1)

    def __call__(self, images: Images) -> Images:
        """Touches every parameter, for `init`."""
        return self.decode(self.encode(images)[..., : self.config.latent_channels])

    def encode(self, images: Images) -> Latents:
        """Mean and log-variance of the latents, side by side, in fp32."""
        moments = self.encoder(images)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        return moments.astype(jnp.float32)

    def decode(self, latents: Latents) -> Images:
        """Pixels in fp32."""
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)


class _Encoder(nn.Module):
    config: VAEConfig

    @nn.compact
    def __call__(self, images):
        cfg = self.config
        last = len(cfg.block_out_channels) - 1
        hidden = _conv(cfg, cfg.block_out_channels[0], "conv_in")(images)
        for level, width in enumerate(cfg.block_out_channels):
            for layer in range(cfg.layers_per_block):
                name = f"down_blocks_{level}_resnets_{layer}"
                hidden = _Resnet(cfg, width, name=name)(hidden)
            if level < last:
                # One row and column of zeros at the far sides, then no padding.
                hidden = jnp.pad(hidden, ((0, 0), (0, 1), (0, 1), (0, 0)))
                name = f"down_blocks_{level}_sampler"
                hidden = _conv(cfg, width, name, strides=2, padding="VALID")(hidden)
        hidden = _Middle(cfg, name="mid_block")(hidden)
        hidden = nn.silu(_norm(cfg, "conv_norm_out")(hidden))
        return _conv(cfg, 2 * cfg.latent_channels, "conv_out")(hidden)


class _Decoder(nn.Module):
    config: VAEConfig

    @nn.compact
    def __call__(self, latents):
        cfg = self.config
        last = len(cfg.block_out_channels) - 1
        hidden = _conv(cfg, cfg.block_out_channels[-1], "conv_in")(latents)
        hidden = _Middle(cfg, name="mid_block")(hidden)
        for level, width in enumerate(reversed(cfg.block_out_channels)):
            for layer in range(cfg.layers_per_block + 1):
                name = f"up_blocks_{level}_resnets_{layer}"
                hidden = _Resnet(cfg, width, name=name)(hidden)
            if level < last:
                hidden = hidden.repeat(2, axis=1).repeat(2, axis=2)
                name = f"up_blocks_{level}_sampler"
                hidden = _conv(cfg, width, name)(hidden)
        hidden = nn.silu(_norm(cfg, "conv_norm_out")(hidden))
        return _conv(cfg, cfg.out_channels, "conv_out")(hidden)


class _Middle(nn.Module):
    config: VAEConfig

    @nn.compact
    def __call__(self, hidden):
        cfg, width = self.config, hidden.shape[-1]
        hidden = _Resnet(cfg, width, name="resnets_0")(hidden)
        if cfg.mid_block_add_attention:
            hidden = hidden + _Attention(cfg, name="attentions_0")(hidden)
        return _Resnet(cfg, width, name="resnets_1")(hidden)


class _Resnet(nn.Module):
    """Two convolutions beside a shortcut that is a 1x1 one where the width changes."""

    config: VAEConfig
    width: int

    @nn.compact
    def __call__(self, hidden):
        cfg = self.config
        out = nn.silu(_norm(cfg, "norm1")(hidden))
        out = _conv(cfg, self.width, "conv1")(out)
        out = nn.silu(_norm(cfg, "norm2")(out))
        out = _conv(cfg, self.width, "conv2")(out)
        if hidden.shape[-1] != self.width:
            hidden = _conv(cfg, self.width, "conv_shortcut", size=1)(hidden)
        return hidden + out


class _Attention(nn.Module):
    """One head over all pixels; too wide for flash kernels. Softmax in fp32."""

    config: VAEConfig

    @nn.compact
    def __call__(self, hidden):
        cfg, (samples, height, width, features) = self.config, hidden.shape
        pixels = _norm(cfg, "group_norm")(hidden)
        pixels = pixels.reshape(samples, height * width, 1, features)
        query, key, value = (
            nn.Dense(features, dtype=cfg.dtype, name=name)(pixels)
            for name in ("to_q", "to_k", "to_v")
        )
        mixed = jax.nn.dot_product_attention(query, key, value, implementation="xla")
        mixed = nn.Dense(features, dtype=cfg.dtype, name="to_out")(mixed)
        return mixed.reshape(hidden.shape)


def _conv(
    cfg: VAEConfig,
    features: int,
    name: str | None = None,
    size: int = 3,
    strides: int = 1,
    padding: str = "SAME",
) -> nn.Conv:
    return nn.Conv(
        features,
        (size, size),
        strides=strides,
        padding=padding,
        dtype=cfg.dtype,
        name=name,
    )


def _norm(cfg: VAEConfig, name: str) -> nn.GroupNorm:
    # The fast variance, a difference of two means, is off by 1e-4 where a mean is large.
    return nn.GroupNorm(
        cfg.norm_num_groups,
        epsilon=1e-6,
        dtype=cfg.dtype,
        use_fast_variance=False,
        name=name,
    )


# Where a layer of ours stands in the files of diffusers.
_CONVOLUTIONS_AND_NORMS = {
    r"(quant_conv|post_quant_conv)": r"\1",
    r"(encoder|decoder)/(conv_\w+)": r"\1.\2",
    r"(encoder|decoder)/(down|up)_blocks_(\d+)_resnets_(\d+)/(\w+)": (
        r"\1.\2_blocks.\3.resnets.\4.\5"
    ),
    r"(encoder|decoder)/(down|up)_blocks_(\d+)_sampler": (
        r"\1.\2_blocks.\3.\2samplers.0.conv"
    ),
    r"(encoder|decoder)/mid_block/resnets_(\d)/(\w+)": r"\1.mid_block.resnets.\2.\3",
    r"(encoder|decoder)/mid_block/attentions_0/group_norm": (
        r"\1.mid_block.attentions.0.group_norm"
    ),
}
_LINEAR = {
    r"(encoder|decoder)/mid_block/attentions_0/(to_[qkv])": (
        r"\1.mid_block.attentions.0.\2"
    ),
    r"(encoder|decoder)/mid_block/attentions_0/to_out": (
        r"\1.mid_block.attentions.0.to_out.0"
    ),
}
TABLE = tuple(
    Rule(f"{ours}/{leaf}", f"{theirs}.{tensor}", layout)
    for places, kernel in ((_CONVOLUTIONS_AND_NORMS, "conv"), (_LINEAR, "dense"))
    for ours, theirs in places.items()
    for leaf, tensor, layout in (
        ("kernel", "weight", kernel),
        ("scale", "weight", "same"),
        ("bias", "bias", "same"),
    )
)
