"""The noise table of DenseGRPO on a world where the right noise is known."""

from statistics import NormalDist

import numpy as np
import pytest

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow.calibration import calibrate


def test_one_round():
    """Oracle: counting by hand; 5 samples, |ups - downs| = 1, 3, 0, 5, 2."""
    gains = np.array(
        [
            [0.1, 2.0, 0.0, -1.0, 0.0],
            [0.2, 0.1, 0.0, -0.1, 0.3],
            [9.0, 0.1, 0.5, -0.1, 0.1],
            [-0.1, 0.3, -7, -0.1, 0.0],
            [-0.1, -5, 0.0, -0.1, 0.0],
        ]
    )
    psi = np.array([0.3, 0.3, 0.5, 0.04, 0.7], np.float32)
    table = calibrate(psi, gains, eps1=2, eps2=0.1)
    np.testing.assert_allclose(table, [0.4, 0.2, 0.6, 0.0, 0.6], rtol=1e-6)


def test_finds_the_noise_where_the_balance_is_lost():
    """Oracle: closed form of a reward -x^2 around a distance d from its best value.

    With noise psi * z a step gains -2 d psi z - psi^2 z^2, above 0 where
    -2 d / psi < z < 0: the more noise, the fewer samples gain.
    """
    count, eps1, eps2 = 2000, 400, 0.01
    # The quantiles of the noise, so that counts are those of the distribution.
    noise = np.array([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])
    distance = np.array([0.1, 0.5, 2.0])  # little, more and much left to gain
    psi = np.array([0.5, 0.5, 0.5])
    for _ in range(400):
        moved = psi * noise[:, None]
        psi = calibrate(psi, -2 * distance * moved - moved**2, eps1, eps2)
    # P(gain) = Phi(2 d / psi) - 1/2, so the balance is lost where
    # P(loss) - P(gain) = 2 - 2 Phi(2 d / psi) = eps1 / count.
    edge = NormalDist().inv_cdf(1 - eps1 / count / 2)
    np.testing.assert_allclose(psi, 2 * distance / edge, atol=1.5 * eps2)


@pytest.mark.parametrize(
    "gains, eps1, eps2, message",
    [
        ([[0.0]], 0.0, 0.1, "eps1: 0.0: above 0"),
        ([[0.0]], 1.0, -0.1, "eps2: -0.1: above 0"),
        ([[0.0], [np.nan]], 1.0, 0.1, "gain: nan of sample 1, step 0: not finite"),
    ],
)
def test_errors(gains, eps1, eps2, message):
    """Oracle: the text of the error a user reads."""
    with pytest.raises(UserError, match=message):
        calibrate(np.array([0.3]), np.array(gains), eps1, eps2)
