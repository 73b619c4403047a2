"""Flax networks, LoRA, weights in and out: the only folder that imports flax.linen."""
