"""The embedded model: the SD3 family's transformer at a size that a laptop trains."""

from pathlib import Path

from flowgrpo_jax.models.flow_model import FlowModel, IdentityAutoencoder, Variables
from flowgrpo_jax.models.mmdit import MMDiTConfig
from flowgrpo_jax.models.text import WordEncoder, WordTokenizer
from flowgrpo_jax.models import weights
from flowgrpo_jax.sprites import world

WEIGHTS = Path(__file__).with_name("weights") / "model.safetensors"
WIDTH, DEPTH, PATCH, MAX_WORDS = 96, 4, 4, 6


def words() -> tuple[str, ...]:
    """All words of the world's prompts but the tokenizer's stop words."""
    plural = tuple(name + ("es" if name.endswith("s") else "s") for name in world.SHAPES)
    other = ("and", "left", "right", "above", "below", "two", "three", "four")
    return (*world.SHAPES, *plural, *world.COLORS, *other)


def make_model(lora_rank: int = 0, lora_alpha: float = 0.0) -> FlowModel:
    """The networks, without weights."""
    tokenizer = WordTokenizer(words(), MAX_WORDS)
    config = MMDiTConfig(
        sample_size=world.SIZE,
        patch_size=PATCH,
        in_channels=3,
        out_channels=3,
        num_layers=DEPTH,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=world.SIZE // PATCH,
        qk_norm="rms_norm",
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
    )
    return FlowModel(
        name="sprites",
        config=config,
        text_encoder=WordEncoder(tokenizer.size, WIDTH, MAX_WORDS),
        tokenizer=tokenizer,
        autoencoder=IdentityAutoencoder(),
        predicts="sample",
    )


def load_variables(path: Path = WEIGHTS) -> Variables:
    """The shipped pretrained weights in fp32, or those of another file."""
    return weights.load(path)[0]
