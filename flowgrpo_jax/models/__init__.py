"""Flax networks, a folder a family; no other folder imports flax.linen. No sampling."""
