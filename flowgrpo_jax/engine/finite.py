"""A run that has diverged ends before a checkpoint holds it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flowgrpo_jax.errors import UserError


def check_finite(
    learning_rate: float, iteration: int, values: Mapping[str, Any]
) -> None:
    """UserError for the first of these that is not finite."""
    for name, value in values.items():
        if not np.all(np.isfinite(value)):
            raise UserError(
                f"train.learning_rate: {learning_rate}: {name} not "
                f"finite at iteration {iteration}: take a lower one and another "
                "--workdir; the checkpoints before are intact"
            )
