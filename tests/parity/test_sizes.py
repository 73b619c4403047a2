"""Pictures that are no squares, in a run on a folder that diffusers wrote."""

import numpy as np
import pytest
from PIL import Image

from flowgrpo_jax import train as trainer
from tests.parity.test_pipeline import pipeline  # noqa: F401
from tests.parity.test_pipeline_run import config_of, prompts  # noqa: F401
from tests.tiny_run import rows


@pytest.mark.slow
@pytest.mark.more
def test_a_run_of_pictures_that_are_no_squares(pipeline, prompts, tmp_path):  # noqa: F811
    """Oracle: by hand; every first ratio is 1, and the contact sheet shows the size."""
    config = config_of(
        pipeline[1],
        prompts,
        resolution="48x96",
        num_iterations=2,
        group_size=2,
        sample__guidance_scale=1.0,
        sample__num_steps=2,
    )
    assert trainer.train(config, tmp_path / "run")
    learned = [row for row in rows(tmp_path / "run") if row["kind"] == "train"]
    assert [row["ratio_gap"] for row in learned] == [0.0] * 2
    assert all(np.isfinite(row["grad_norm"]) for row in learned)
    sheet = Image.open(tmp_path / "run" / "samples" / "iteration_000002.png")
    # Twelve columns and four rows, enlarged twice, and gaps of two pixels.
    assert sheet.size == (12 * (2 * 96 + 2) - 2, 4 * (2 * 48 + 2) - 2)
