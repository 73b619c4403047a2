"""The bar of every comparison with torch."""

import numpy as np
import torch

BAR = 1e-4  # largest error, relative to the largest value of the oracle's output


def assert_close(ours, theirs: torch.Tensor | np.ndarray, bar: float = BAR) -> None:
    """Largest difference at most `bar` times the largest value of `theirs`."""
    if isinstance(theirs, torch.Tensor):
        theirs = theirs.detach().numpy()
    ours = np.asarray(ours, np.float32)
    assert ours.shape == theirs.shape
    error, scale = np.abs(ours - theirs).max(), np.abs(theirs).max()
    assert error <= bar * scale, f"error {error:.3g} at a scale of {scale:.3g}"
