"""Stable Diffusion 3 and 3.5: transformer, text, files. Nothing of other families."""
