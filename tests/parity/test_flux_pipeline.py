"""A whole folder of FLUX.1: our images against those of diffusers from the same noise."""

import jax
import numpy as np
import pytest
import torch

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import restore, variants
from flowgrpo_jax.config import families
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.inference import sampling
from flowgrpo_jax.models.spec import ModelSpec
from tests.parity import tiny_flux
from tests.parity.test_pipeline import PROMPTS, assert_same_images

TOKENS = 24


@pytest.fixture(scope="session", params=tiny_flux.KINDS)
def pipeline(request, tmp_path_factory):
    """(diffusers' pipeline, its folder, kind)."""
    folder = tmp_path_factory.mktemp(f"flux_{request.param}")
    made = tiny_flux.write_pipeline(folder, kind=request.param)
    return made, folder, request.param


def config_of(folder, cache, guidance=None, steps=None):
    config = configs.make(f"model={folder}")
    for key, value in families.of(str(folder)).sampling.items():
        configs.assign(config, key, value)
    config.embedding_cache = str(cache)
    config.dtype, config.resolution, config.microbatch = "float32", 64, 2
    config.max_sequence_length = TOKENS
    return variants.with_options(config, 3, guidance, steps)


def theirs(pipeline, config, height=64, width=64):
    """Images of diffusers from the noise that our package gives these prompts."""
    images = []
    for number, prompt in enumerate(PROMPTS):
        key = jax.random.key(config.eval.seed)
        for counter in (number, 0, 0):  # prompt, member, step
            key = jax.random.fold_in(key, counter)
        noise = jax.random.normal(key, (height // 8, width // 8, 16))
        latents = torch.from_numpy(np.array(noise)).permute(2, 0, 1)[None]
        latents = pipeline._pack_latents(latents, 1, 16, height // 8, width // 8)
        made = pipeline(
            prompt,
            height=height,
            width=width,
            num_inference_steps=config.sample.eval_num_steps,
            guidance_scale=config.eval.guidance_scale,
            latents=latents,
            max_sequence_length=TOKENS,
            output_type="np",
        )
        images.append(made.images[0])
    return np.stack(images)


@pytest.mark.parametrize("guidance", [None, 1.0])
def test_images(pipeline, tmp_path, guidance):
    """Oracle: diffusers' FluxPipeline, fp32, its own default steps and guidance.

    schnell reads no guidance, and its pipeline does not ask it twice: a scale of 1.
    """
    made, folder, kind = pipeline
    if kind == "schnell":
        guidance = 1.0
    config = config_of(folder, tmp_path, guidance)
    assert families.of(str(folder)).name == "flux"
    assert config.sample.eval_num_steps == 28
    images = sampling.sample(
        *restore.make_pipeline(config, restore.base(config), PROMPTS), len(PROMPTS), 1
    )[:, 0]
    assert_same_images(images, theirs(made, config))


# Of FLUX.1-dev's scheduler at 512, 720 and 1024 pixels; see docs/golden_numbers.md.
SIGMAS = {
    512: "1.0 0.903736 0.789705 0.652489 0.484218 0.273003 0.0",
    720: "1.0 0.917502 0.816466 0.689855 0.526548 0.307891 0.0",
    1024: "1.0 0.940444 0.86332 0.759511 0.612267 0.387119 0.0",
}


@pytest.mark.parametrize("resolution", SIGMAS)
def test_sigmas_depend_on_the_size(resolution):
    """Oracle: sigmas printed from diffusers' scheduler, to their six digits."""
    row = families.of("flux.1-dev")
    model = row.code.plan(ModelSpec("flux.1-dev", resolution=resolution), None)
    wanted = np.array(SIGMAS[resolution].split(), float)
    np.testing.assert_allclose(model.sigmas(6), wanted, atol=6e-7)
    config = configs.make("model=flux.1-dev")
    config.sample.schedule = "by_tokens"
    found = assemble.make_sigmas(config, model, 6)
    np.testing.assert_allclose(found, wanted, atol=6e-7)


def test_schnell_and_the_fixed_shift():
    """Oracle: even steps for schnell; shift 3 as DanceGRPO's family has it."""
    model = families.of("flux.1-schnell").code.plan(ModelSpec("flux.1-schnell"), None)
    np.testing.assert_allclose(model.sigmas(4), [1, 0.75, 0.5, 0.25, 0], atol=1e-7)
    nodes = np.linspace(1, 0, 17)
    np.testing.assert_allclose(
        model.sigmas(16, 3.0), 3 * nodes / (1 + 2 * nodes), atol=1e-7
    )


def test_what_cannot_be(pipeline, tmp_path):
    """Oracle: the lines, by hand."""
    config = config_of(pipeline[1], tmp_path)
    config.resolution = 72
    with pytest.raises(UserError, match="resolution: 72: must be 0 .*1024.* of 16"):
        restore.base(config)


@pytest.mark.parametrize("recipe", ["g2rpo", "dance_grpo", "flow_grpo"])
def test_recipes_have_their_authors_values(recipe):
    """Oracle: the table of recipes; nothing is told as left to a family's defaults."""
    from flowgrpo_jax.config import checks, recipes

    config = configs.make(f"model=flux.1-dev,recipe={recipe}")
    checks.check(config)
    for key, value in recipes.RECIPES[recipe].authors["flux.1-dev"].items():
        assert configs.get(config, key) == value
    assert not [line for line in checks.remarks(config) if line.startswith("recipe")]
