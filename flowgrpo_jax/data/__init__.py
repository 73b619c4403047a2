"""Prompts, metadata, cached embeddings; batches of (seed, iteration). No networks."""
