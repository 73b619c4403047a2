"""Pictures that are no squares, in a run on a folder that diffusers wrote."""

import numpy as np
import pytest
from PIL import Image

from flowgrpo_jax import config as configs
from flowgrpo_jax import train as trainer
from tests.parity.test_pipeline import pipeline  # noqa: F401
from tests.tiny_run import rows

WORDS = ("open", "stop", "hello", "exit")


def config_of(folder, prompts, **values):
    return configs.make(
        f"model={folder}",
        max_sequence_length=16,
        embedding_cache=f"{prompts}.cache",
        prompts=str(prompts),
        reward={"jpeg_compressibility": 1.0},
        num_iterations=2,
        prompts_per_iteration=2,
        group_size=2,
        updates_per_iteration=1,
        microbatch=4,
        mesh={"data": 1},
        eval__prompts=str(prompts),
        eval__every=0,
        eval__images_per_task=2,
        eval__final_images_per_task=2,
        eval__guidance_scale=1.0,
        eval__sde=False,
        sample__guidance_scale=1.0,
        sample__num_steps=2,
        sample__eval_num_steps=1,
        checkpoint__every=1,
        log__tensorboard=False,
        train__beta=0.0,
        **values,
    )


@pytest.mark.slow
@pytest.mark.more
def test_a_run_of_pictures_that_are_no_squares(pipeline, tmp_path):  # noqa: F811
    """Oracle: by hand; every first ratio is 1, and the contact sheet shows the size."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f'a sign that says "{word}"\n' for word in WORDS))
    config = config_of(pipeline[1], prompts, resolution="48x96")
    assert trainer.train(config, tmp_path / "run")
    learned = [row for row in rows(tmp_path / "run") if row["kind"] == "train"]
    assert [row["ratio_gap"] for row in learned] == [0.0] * 2
    assert all(np.isfinite(row["grad_norm"]) for row in learned)
    sheet = Image.open(tmp_path / "run" / "samples" / "iteration_000002.png")
    # Twelve columns and four rows, enlarged twice, and gaps of two pixels.
    assert sheet.size == (12 * (2 * 96 + 2) - 2, 4 * (2 * 48 + 2) - 2)
