"""How much noise each step should explore with: DenseGRPO's table psi(t).

The table is made once, before training: roll out with the present table, score what
every step gained, let `calibrate` move the table a little, and repeat. The transition
"dance" takes an entry of the table as the noise level of its step.
"""

import numpy as np
from jaxtyping import Float, Float64

from flowgrpo_jax.errors import UserError


def calibrate(
    psi: Float[np.ndarray, " step"],
    gains: Float[np.ndarray, "sample step"],
    eps1: int | float,
    eps2: float,
) -> Float64[np.ndarray, " step"]:
    """The table after one round of the calibration of DenseGRPO (arXiv 2601.20218).

    `gains` are the step-wise rewards of samples drawn with the noise of `psi`: how much
    higher the reward of the image that the ODE completes after a step is than before
    it. While about as many samples gain as lose at a step (the numbers of them differ
    by less than `eps1` samples) there is room to explore: its noise goes up by `eps2`,
    a diffusion coefficient. Where the balance is lost it goes down by `eps2`, never
    below 0. Samples without a change count on neither side.

    UserError if an eps is not above 0 or a gain is not finite.
    """
    for name, value in (("eps1", eps1), ("eps2", eps2)):
        if not value > 0:
            raise UserError(f"{name}: {value}: above 0")
    if not np.isfinite(gains).all():
        sample, step = np.argwhere(~np.isfinite(gains))[0]
        value = gains[sample, step]
        raise UserError(f"gain: {value} of sample {sample}, step {step}: not finite")
    imbalance = np.abs(np.sign(gains).sum(axis=0))
    change = np.where(imbalance < eps1, eps2, -eps2)
    return np.maximum(psi.astype(np.float64) + change, 0.0)
