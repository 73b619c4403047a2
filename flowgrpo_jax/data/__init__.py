"""Prompts and metadata; stateless batches from (seed, iteration)."""
