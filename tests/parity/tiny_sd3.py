"""A whole StableDiffusion3Pipeline of random weights, small enough for tests.

Everything that a real folder has: three tokenizers and encoders, transformer, VAE and
scheduler. 64x64 pixels are latents of 8x8; the vocabularies know a few words and every
letter.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

WORDS = "a photo of the red green blue circle square sign that reads hello".split()
# What tells the transformers of the family apart.
KINDS = {
    "sd3-medium": {"qk_norm": None, "dual_attention_layers": ()},
    "sd3.5-medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "sd3.5-large": {"qk_norm": "rms_norm", "dual_attention_layers": ()},
}
# Together narrower than T5, so that their join is padded, as in the real model.
CLIP_L, CLIP_G, T5 = 16, 24, 48


def write_pipeline(
    folder: str | Path, seed: int = 0, kind: str = "sd3.5-medium"
) -> StableDiffusion3Pipeline:
    """Make a random pipeline of one `kind`, `save_pretrained` it, and return it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = StableDiffusion3Pipeline(
            transformer=randomize(transformer(kind)),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=2.5),  # no default
            vae=randomize(vae()),
            text_encoder=randomize(clip_text(CLIP_L, "quick_gelu")),
            tokenizer=clip_tokenizer("<|endoftext|>"),
            text_encoder_2=randomize(clip_text(CLIP_G, "gelu")),
            tokenizer_2=clip_tokenizer("!"),  # CLIP-G pads with "!", as in the hub's
            text_encoder_3=randomize(t5()),
            tokenizer_3=t5_tokenizer(),
        )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


@torch.no_grad()
def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Move what would hide a mix-up: biases off 0, norm scales off 1.

    And the positional table off the formula, which the file need not follow.
    """
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    for name, buffer in module.named_buffers():
        if name == "pos_embed.pos_embed":
            buffer.add_(0.1 * torch.randn_like(buffer))
    return module.eval()


def transformer(kind: str) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5,
        caption_projection_dim=32,
        pooled_projection_dim=CLIP_L + CLIP_G,
        pos_embed_max_size=12,
        **KINDS[kind],
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def clip_text(width: int, activation: str) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer("!")),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=2,
            projection_dim=width,
            hidden_act=activation,
            # The ids in the hub's files, which are not the tokenizer's: 2 means that
            # the pooled token is the one with the highest id.
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
        )
    )


def t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()) + 28,  # rows that no token uses, as XXL
            d_model=T5,
            d_kv=16,
            d_ff=64,
            num_layers=3,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )


def clip_tokenizer(pad_token: str) -> CLIPTokenizer:
    """Byte-level BPE with CLIP's order: bytes, bytes that end a word, merges, specials.

    "!" comes first and the end of text last, as in the real vocabulary.
    """
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair, parts = tuple(parts[:2]), [parts[0] + parts[1], *parts[2:]]
            if pair not in merges:
                merges.append(pair)
                tokens.append(parts[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        pad_token=pad_token,
        model_max_length=77,
    )


def t5_tokenizer() -> T5TokenizerFast:
    """Unigram pieces: specials first, then words and letters, sentinels last."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + word, -4.0) for word in WORDS]
    pieces += [(chr(code), -6.0) for code in range(ord("!"), ord("~") + 1)]
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(100))]
    pieces += [(sentinel, 0.0) for sentinel in sentinels]
    return T5TokenizerFast(vocab=pieces, model_max_length=512)
