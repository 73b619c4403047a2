"""A whole folder of FLUX.1: our images against those of diffusers from the same noise."""

import json

import jax
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax import train as trainer
from flowgrpo_jax.assemble import restore, sizes, specs, variants
from flowgrpo_jax.assemble import run as assembled
from flowgrpo_jax.config import families
from flowgrpo_jax.engine.planner import Planner
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.inference import sampling
from flowgrpo_jax.models.spec import ModelSpec
from flowgrpo_jax.runtime import resolution
from tests.parity import tiny_flux
from tests.parity.test_pipeline import PROMPTS, assert_same_images
from tests.parity.test_pipeline_run import assert_reward_rises, prompts  # noqa: F401
from tests.parity.test_pipeline_run import config_of as config_of_run
from tests.tiny_run import rows

TOKENS = 24


@pytest.fixture(scope="session", params=tiny_flux.KINDS)
def pipeline(request, tmp_path_factory):
    """(diffusers' pipeline, its folder, kind)."""
    folder = tmp_path_factory.mktemp(f"flux_{request.param}")
    made = tiny_flux.write_pipeline(folder, kind=request.param)
    return made, folder, request.param


def config_of(folder, cache, guidance=None, steps=None, resolution=64):
    config = configs.make(f"model={folder}")
    for key, value in families.of(str(folder)).sampling.items():
        configs.assign(config, key, value)
    config.embedding_cache = str(cache)
    config.dtype, config.resolution, config.microbatch = "float32", resolution, 2
    config.max_sequence_length = TOKENS
    return variants.with_options(config, 3, guidance, steps)


def theirs(pipeline, config):
    """Images of diffusers from the noise that our package gives these prompts."""
    height, width = resolution.parse(config.resolution)
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


@pytest.mark.parametrize("guidance, size", [(None, 64), (1.0, "48x96")])
def test_images(pipeline, tmp_path, guidance, size):
    """Oracle: diffusers' FluxPipeline, fp32, its own default steps and guidance.

    schnell takes no guidance: its pipeline ignores the scale, and so do we.
    """
    made, folder, _ = pipeline
    config = config_of(folder, tmp_path, guidance, resolution=size)
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


@pytest.mark.parametrize("side", SIGMAS)
def test_sigmas_depend_on_the_size(side):
    """Oracle: sigmas printed from diffusers' scheduler, to their six digits."""
    row = families.of("flux.1-dev")
    model = row.code.plan(ModelSpec("flux.1-dev", resolution=side), None)
    wanted = np.array(SIGMAS[side].split(), float)
    np.testing.assert_allclose(model.sigmas(6), wanted, atol=6e-7)
    config = configs.make("model=flux.1-dev")
    config.sample.schedule = "by_tokens"
    found = assemble.make_sigmas(config, model, 6)
    np.testing.assert_allclose(found, wanted, atol=6e-7)


def test_sigmas_of_every_size_of_a_run():
    """Oracle: the same; and the networks are one at all sizes."""
    config = configs.make("model=flux.1-dev")
    config.resolution = 512
    row = families.of("flux.1-dev")
    model = row.code.plan(assemble.model_spec(config), None)
    wanted = [resolution.parse(side) for side in (720, 1024, "1024x512")]
    found = sizes.models(config, model, wanted)
    assert list(found) == [(512, 512), *wanted]
    for side, told in SIGMAS.items():
        sized = found[side, side]
        assert sized.latent_shape == (side // 8, side // 8, 16)
        np.testing.assert_allclose(
            assemble.make_sigmas(config, sized, 6),
            np.array(told.split(), float),
            atol=6e-7,
        )
    assert {one.denoiser for one in found.values()} == {model.denoiser}
    assert found[1024, 512].latent_shape == (128, 64, 16)


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
    for wrong in (72, "64x72", "4112x64"):
        config.resolution = wrong
        with pytest.raises(
            UserError, match=f"n: {wrong}: must be 0 .*1024.* of 16, at"
        ):
            restore.base(config)


@pytest.mark.parametrize(
    "recipe, evaluations", [("g2rpo", 1708), ("g2rpo_released", 1504)]
)
def test_evaluations_of_a_prompt(recipe, evaluations):
    """Oracle: by hand; the authors' loop spends 2188 and 1792 (algorithms, G2RPO)."""
    config = configs.make(f"model=flux.1-dev,recipe={recipe}")
    made = Planner(specs.plan_spec(config), 1).plan(0, 0)
    assert len(made.evaluated) == evaluations
    model = families.of("flux.1-dev").code.plan(assemble.model_spec(config), None)
    assert model.latent_shape == (90, 90, 16)  # 720 pixels
    nodes = np.linspace(1, 0, 17)
    found = assemble.make_sigmas(config, model, 16)
    np.testing.assert_allclose(found, 3 * nodes / (1 + 2 * nodes), atol=1e-7)
    assert model.passes(config.sample.guidance_scale) == 1  # embedded, not asked twice


@pytest.mark.slow
@pytest.mark.more
@pytest.mark.parametrize("pipeline", ["dev"], indirect=True)
@pytest.mark.parametrize(
    "recipe, use_lora", [("flow_grpo", True), ("g2rpo", False)], ids=["lora", "full"]
)
def test_training(pipeline, prompts, tmp_path, recipe, use_lora, monkeypatch):  # noqa: F811
    """Oracle: in bf16 every first ratio is 1; killed and resumed rows are equal."""
    config = config_of_run(
        pipeline[1],
        prompts,
        recipe,
        num_iterations=3,
        prompts_per_iteration=2,
        group_size=4,
        eval__guidance_scale=3.5,
        sample__num_steps=4,
        sample__branch_steps=(0, 1),
        sample__granularities=(1, 2),
        checkpoint__every=1,
        train__use_lora=use_lora,
        train__learning_rate=1e-3,
    )
    assert config.sample.guidance_scale == 3.5
    quiet, other = tmp_path / "quiet", tmp_path / "other"
    assert trainer.train(config, quiet)
    learned = [row for row in rows(quiet) if row["kind"] == "train"]
    assert [row["ratio_gap"] for row in learned] == [0.0] * 3
    step = assembled.Run.step

    def killed(self, state, iteration):
        if iteration == 2:
            raise KeyboardInterrupt
        return step(self, state, iteration)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(assembled.Run, "step", killed)
        trainer.train(config, other)
    assert trainer.train(config, other)
    assert json.dumps(rows(other)) == json.dumps(rows(quiet))  # NaN among them
    if use_lora:
        loaded = FluxPipeline.from_pretrained(pipeline[1])
        loaded.load_lora_weights(str(quiet))
        assert loaded.get_active_adapters()
    else:
        FluxTransformer2DModel.from_pretrained(quiet / "transformer")


@pytest.mark.slow
@pytest.mark.more
@pytest.mark.parametrize("pipeline", ["dev"], indirect=True)
@pytest.mark.parametrize(
    "values",
    [
        {"train__use_lora": True, "train__learning_rate": 1e-1},
        {
            "recipe": "g2rpo",
            "sample__branch_steps": (0, 1),
            "sample__granularities": (1, 2),
            "train__use_lora": False,
            "train__learning_rate": 1e-2,
        },
    ],
    ids=["flow_grpo-lora", "g2rpo-full"],
)
def test_reward_rises(pipeline, prompts, tmp_path, values):  # noqa: F811
    """Oracle: the spread of the images; and every first ratio is 1."""
    config = config_of_run(pipeline[1], prompts, num_iterations=40, **values)
    assert_reward_rises(config, tmp_path / "run")


@pytest.mark.parametrize("recipe", ["g2rpo", "dance_grpo", "flow_grpo"])
def test_recipes_have_their_authors_values(recipe):
    """Oracle: the table of recipes; nothing is told as left to a family's defaults."""
    from flowgrpo_jax.config import checks, recipes

    config = configs.make(f"model=flux.1-dev,recipe={recipe}")
    checks.check(config)
    for key, value in recipes.RECIPES[recipe].authors["flux.1-dev"].items():
        assert configs.get(config, key) == value
    assert not [line for line in checks.remarks(config) if line.startswith("recipe")]
