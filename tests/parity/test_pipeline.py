"""A whole pipeline folder: our images against those of diffusers from the same noise."""

import shutil

import jax
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3 as sd3

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import restore, sizes, variants
from flowgrpo_jax.data import embedding_cache
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import schedule
from flowgrpo_jax.inference import sampling
from flowgrpo_jax.models.folder_encoders import FolderEncoders
from flowgrpo_jax.runtime import resolution
from tests.parity import tiny_sd3

PROMPTS = ["a photo of the red circle", "the sign that reads hello"]
NEGATIVE = "blue square"
STEPS, TOKENS = 28, 24


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """(diffusers' pipeline, its folder)."""
    folder = tmp_path_factory.mktemp("pipeline")
    return tiny_sd3.write_pipeline(folder), folder


def config_of(folder, cache, guidance=4.5, negative="", recipe="flow_grpo"):
    config = configs.make(f"model={folder},recipe={recipe}")
    config.embedding_cache = str(cache)
    config.dtype, config.resolution = "float32", 64
    config.max_sequence_length, config.negative_prompt = TOKENS, negative
    config.microbatch = 2
    return variants.with_options(config, 3, guidance, STEPS)


def theirs(pipeline, config, guidance):
    """Images of diffusers from the noise that our package gives these prompts."""
    height, width = resolution.parse(config.resolution)
    images = []
    for number, prompt in enumerate(PROMPTS):
        key = jax.random.key(config.eval.seed)
        for counter in (number, 0, 0):  # prompt, member, step
            key = jax.random.fold_in(key, counter)
        noise = jax.random.normal(key, (height // 8, width // 8, 16))
        latents = torch.from_numpy(np.array(noise)).permute(2, 0, 1)[None]
        made = pipeline(
            prompt,
            negative_prompt=config.negative_prompt,
            height=height,
            width=width,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            latents=latents,
            max_sequence_length=TOKENS,
            output_type="np",
        )
        images.append(made.images[0])
    return np.stack(images)


def assert_same_images(ours, wanted):
    """At most 1/255 in the mean and 3/255 anywhere; the images are no blanks."""
    assert wanted.std() > 0.02
    difference = np.abs(ours - wanted)
    mean, most = 255 * difference.mean(), 255 * difference.max()
    print(f"difference of pixels: mean {mean:.2g}/255, at most {most:.2g}/255")
    assert difference.mean() <= 1 / 255 and difference.max() <= 3 / 255


@pytest.mark.parametrize("guidance, negative", [(4.5, ""), (1.0, "")])
def test_images(pipeline, tmp_path, guidance, negative):
    """Oracle: diffusers' StableDiffusion3Pipeline, fp32."""
    theirs_pipeline, folder = pipeline
    config = config_of(folder, tmp_path, guidance, negative)
    images = sampling.sample(
        *restore.make_pipeline(config, restore.base(config), PROMPTS), len(PROMPTS), 1
    )[:, 0]
    print(f"guidance {guidance}, negative prompt {negative!r}")
    assert_same_images(images, theirs(theirs_pipeline, config, guidance))


def test_images_of_two_sizes(pipeline, tmp_path):
    """Oracle: the same, one size after the other; the noise is that of the prompt.

    The positional table is a crop for both, 4 x 6 patches: of neither size.
    """
    made, folder = pipeline
    prompts = [Prompt(PROMPTS[0]), Prompt(PROMPTS[1], {"resolution": "48x96"})]
    config = config_of(folder, tmp_path, 4.5, NEGATIVE)
    restored = restore.base(config, sizes.asked(config, prompts))
    table = restored.variables["buffers"]["pos_embed"]["table"]
    assert table.shape == (4, 6, 32)
    images = sampling.by_prompt(
        *restore.make_pipeline(config, restored, prompts), len(prompts), 1
    )
    assert [one.shape for one in images] == [(1, 64, 64, 3), (1, 48, 96, 3)]
    for number, size in enumerate((64, "48x96")):
        config.resolution = size
        assert_same_images(images[number][0], theirs(made, config, 4.5)[number])


@pytest.mark.parametrize(
    "options",
    [
        {"shift": 2.5},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "max_shift": 3.0},
    ],
)
def test_shift_of_the_folder(pipeline, tmp_path, options):
    """Oracle: diffusers' scheduler, as its SD3 pipeline asks it; --config wins."""
    _, folder = pipeline
    copy = shutil.copytree(folder, tmp_path / "copy")
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    scheduler.save_pretrained(copy / "scheduler")
    mu = {}
    if "use_dynamic_shifting" in options:
        held = scheduler.config
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = {"mu": sd3.calculate_shift(16, *(held[name] for name in names))}
    scheduler.set_timesteps(STEPS, **mu)
    config = config_of(copy, tmp_path)
    model, _ = assemble.abstract_model(config)
    found = assemble.make_sigmas(config, model, STEPS)
    np.testing.assert_allclose(found, scheduler.sigmas.numpy(), rtol=2e-6)
    config.sample.shift = 4.0
    found = assemble.make_sigmas(config, model, STEPS)
    np.testing.assert_array_equal(found, schedule.shifted_grid(STEPS, 4.0))


def test_prompts_are_encoded_once(pipeline, tmp_path, monkeypatch, capsys):
    """Oracle: the contract; the second table finds all on disk, encoders stay away."""
    config = config_of(pipeline[1], tmp_path)
    restored = restore.base(config)
    first = restore.place(config, restored, PROMPTS).text
    assert "encoding 3 prompts" in capsys.readouterr().out
    monkeypatch.delattr(FolderEncoders, "encoding")
    second = restore.place(config, restored, PROMPTS[:1]).text
    np.testing.assert_array_equal(
        second.rows(PROMPTS[:1]).context, first.rows(PROMPTS[:1]).context
    )
    files = restored.model.prompts.files()
    names = {f"{path.parent.name}/{path.name}" for path in files}
    assert "text_encoder_3/model.safetensors" in names
    assert len(embedding_cache.fingerprint(files, tmp_path)) == 64


def test_what_cannot_be(pipeline, tmp_path):
    """Oracle: the lines, by hand."""
    config = config_of(pipeline[1], tmp_path)
    config.resolution = 72
    with pytest.raises(UserError, match="resolution: 72: must be 0 .*own, 64.* of 16"):
        restore.base(config)
    config.resolution = "64x208"  # its positional table has 12 x 12 patches
    with pytest.raises(UserError, match="resolution: 64x208: .* of 16, at most 192"):
        restore.base(config)
    prompts = [Prompt("a"), Prompt("b", {"resolution": 40}, 1)]
    with pytest.raises(UserError, match="^prompts: a.jsonl:2: resolution: 40x40: mu"):
        sizes.asked(config, prompts, "prompts", "a.jsonl")
    config.resolution = 64
    config.train.lora_path, config.train.use_lora = "x", False
    with pytest.raises(UserError, match="train.lora_path: x: needs train.use_lora"):
        assemble.warm_start(config, restored_model(config), {})


def restored_model(config):
    return restore.base(config).model
