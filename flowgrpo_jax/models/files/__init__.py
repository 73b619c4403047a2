"""Weights in and out: tensors, configurations, LoRA files, tokenizers. No networks."""
