"""A policy trained here, in diffusers and in PEFT; and an adapter of PEFT's, here."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.numpy import save_file

from flowgrpo_jax import assemble, compare
from flowgrpo_jax.assemble import exporting, restore
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.inference import sampling
from flowgrpo_jax.models.files import lora_files
from flowgrpo_jax.models.sd3.family import CODE as sd3
from flowgrpo_jax.train import train
from tests.parity import tiny_sd3
from tests.parity.test_pipeline import (
    PROMPTS,
    assert_same_images,
    config_of,
    pipeline,  # noqa: F401
    theirs,
)

RANK, ALPHA = 32, 64.0
TARGETS = [
    f"attn.{name}"
    for name in (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    )
]


def lora_config(folder, cache):
    config = config_of(folder, cache)
    config.train.lora_rank, config.train.lora_alpha = RANK, ALPHA
    return config


@pytest.fixture(scope="module")
def tuned(pipeline, tmp_path_factory):  # noqa: F811
    """(config, restored) of a run of two iterations on JPEG size."""
    cache = tmp_path_factory.mktemp("cache")
    config = lora_config(pipeline[1], cache)
    prompts = cache / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    config.prompts = config.eval.prompts = str(prompts)
    config.reward = {"jpeg_compressibility": 1.0}
    config.num_iterations, config.prompts_per_iteration, config.group_size = 2, 2, 2
    config.sample.num_steps, config.sample.eval_num_steps = 3, 2
    config.eval.images_per_task = config.eval.final_images_per_task = 2
    config.eval.sde, config.log.tensorboard = False, False
    config.train.learning_rate = 0.03  # a change that shows after four updates
    workdir = tmp_path_factory.mktemp("run")
    assert train(config, workdir)
    config.sample.eval_num_steps = 28
    return config, restore.tuned(config, workdir), workdir


@pytest.fixture(scope="module")
def untuned(tuned):
    """The images of the policy without its LoRA."""
    config, restored, _ = tuned
    nothing = {"lora": jax.tree.map(np.zeros_like, restored.variables["lora"])}
    base = dataclasses.replace(restored, variables=restored.variables | nothing)
    return sampling.sample(
        *restore.make_pipeline(config, base, PROMPTS), len(PROMPTS), 1
    )[:, 0]


@pytest.fixture(scope="module")
def ours(tuned, untuned):
    """The tuned policy's images; they differ from those without its LoRA."""
    config, restored, _ = tuned
    images = sampling.sample(
        *restore.make_pipeline(config, restored, PROMPTS), len(PROMPTS), 1
    )[:, 0]
    assert np.abs(images - untuned).max() > 10 / 255
    return images


@pytest.mark.parametrize("metadata", [True, False])
def test_lora_in_diffusers(pipeline, tuned, ours, tmp_path, metadata):  # noqa: F811
    """Oracle: diffusers with load_lora_weights, also where no metadata tells of alpha."""
    config, restored, _ = tuned
    exporting.export(config, restored, tmp_path, False)
    if not metadata:
        strip_metadata(tmp_path / lora_files.DIFFUSERS_FILE)
    loaded = StableDiffusion3Pipeline.from_pretrained(pipeline[1])
    loaded.load_lora_weights(tmp_path)
    assert_same_images(ours, theirs(loaded, config, 4.5))


def test_a_short_run_is_told_as_diffusers_shows_it(
    pipeline,  # noqa: F811
    tuned,
    ours,
    untuned,
    tmp_path,
):
    """Oracle: diffusers' images of two iterations, whose reward moves the same way."""
    config, restored, _ = tuned
    assert config.train.ema and restored.weights == "ema" and restored.differs
    reward = assemble.make_reward(config)
    prompts = [Prompt(text) for text in PROMPTS]

    def side(images):
        return images[:, None], {"jpeg": reward(images, prompts)["avg"][:, None]}

    base, after = side(untuned), side(ours)
    assert compare.same_images(base, after) == ""
    ((_, before, now, _),) = compare.summary(base, after)
    assert before != now
    exporting.export(config, restored, tmp_path, False)
    loaded = StableDiffusion3Pipeline.from_pretrained(pipeline[1])
    plain = theirs(loaded, config, 4.5)
    loaded.load_lora_weights(tmp_path)
    shown = theirs(loaded, config, 4.5)
    assert np.abs(shown - plain).max() > 10 / 255
    moved = reward(shown, prompts)["avg"].mean() - reward(plain, prompts)["avg"].mean()
    print(f"reward {now - before:+.6f} here, {moved:+.6f} in diffusers")
    # Pictures agree to 3/255: 10 bytes of a JPEG, 2e-5 of the reward.
    assert abs(moved - (now - before)) < 2e-5 or moved * (now - before) > 0


def strip_metadata(path):
    with safe_open(path, framework="np") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}
    save_file(weights, path, {"format": "pt"})


def test_lora_in_peft(pipeline, tuned, ours, tmp_path):  # noqa: F811
    """Oracle: PeftModel.from_pretrained on diffusers' transformer."""
    config, restored, _ = tuned
    exporting.export(config, restored, tmp_path, False)
    loaded = StableDiffusion3Pipeline.from_pretrained(pipeline[1])
    adapted = PeftModel.from_pretrained(loaded.transformer, tmp_path / "peft")
    loaded.transformer = adapted.merge_and_unload()
    assert_same_images(ours, theirs(loaded, config, 4.5))


def test_transformer_in_diffusers(pipeline, tuned, ours, tmp_path):  # noqa: F811
    """Oracle: diffusers with the folded transformer of its from_pretrained."""
    config, restored, _ = tuned
    exporting.export(config, restored, tmp_path, True)
    network = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    loaded = StableDiffusion3Pipeline.from_pretrained(pipeline[1], transformer=network)
    assert_same_images(ours, theirs(loaded, config, 4.5))


def test_model_card(tuned):
    """Oracle: the config; what was trained and measured stands there."""
    config, restored, workdir = tuned
    card = exporting.model_card(config, workdir, restored, False)
    for told in ("jpeg_compressibility (1)", "for 2 iterations", "alpha 64"):
        assert told in card
    assert "- Weights: the EMA after 2 iterations, LoRA of rank" in card
    assert "Nothing in it differs" not in card
    assert "eval_reward_jpeg_compressibility" in card
    # A folder says nothing to others: neither its path nor its name stand there.
    assert "base_model:" not in card and "base = ...  # the folder" in card
    assert config.model not in card and f" on {Path(config.model).name}" not in card
    assert "from diffusers import StableDiffusion3Pipeline\n" in card
    same = dataclasses.replace(restored, differs=False, weights="learner")
    config = config.copy_and_resolve_references()
    config.model = "sd3.5-medium"
    card = exporting.model_card(config, workdir, same, True)
    assert "base_model: stabilityai/stable-diffusion-3.5-medium\n" in card
    assert 'base = "stabilityai/stable-diffusion-3.5-medium"' in card
    assert "the learner after 2 iterations, the whole transformer" in card
    assert "**Nothing in it differs from the base model.**" in card
    imports = "import SD3Transformer2DModel, StableDiffusion3Pipeline"
    assert imports in card and "in place of its own" not in card
    config.transformer_path = "/data/other.safetensors"
    card = exporting.model_card(config, workdir, same, False)
    assert "- Base model: the transformer of other.safetensors in place of its" in card
    assert "/data" not in card


@pytest.mark.parametrize(
    "model, name",
    [
        ("sd3-medium", "stabilityai/stable-diffusion-3-medium-diffusers"),
        ("me/my-sd3", "me/my-sd3"),
        ("/data/sd3", None),
        ("~/sd3", None),
        ("./sd3", None),
        ("../sd3", None),
        ("models/sd3/medium", None),
        ("sd3_folder", None),
    ],
)
def test_the_base_model_s_name_for_others(model, name):
    """Oracle: by hand; ids of the hub, but no folder, whether it is there or not."""
    assert exporting.hub_id(config_of(model, "cache")) == name


def test_a_base_model_that_has_moved(pipeline, tuned, tmp_path):  # noqa: F811
    """Oracle: the very weights, read from a copy; and the line for another pipeline."""
    config, restored, workdir = tuned
    copy = shutil.copytree(pipeline[1], tmp_path / "copy")
    there = restore.choose_config(None, str(workdir), str(copy))
    found = restore.tuned(there, workdir)
    jax.tree.map(np.testing.assert_array_equal, found.variables, restored.variables)
    assert there.model == config.model and found.differs
    card = exporting.model_card(there, workdir, found, False)
    assert str(copy) not in card and config.model not in card

    tiny_sd3.write_pipeline(tmp_path / "other", seed=1)
    wrong = restore.choose_config(None, str(workdir), str(tmp_path / "other"))
    with pytest.raises(UserError, match="other: other weights than the run in"):
        restore.tuned(wrong, workdir)


# Other layers of a PEFT adapter, and the pattern that names them here.
MORE = ["attn2.to_q", "attn2.to_k", "attn2.to_v", "ff.net.2", "norm1.linear"]
MORE += ["time_text_embed.timestep_embedder.linear_2", "proj_out"]
PATTERNS = (r"attn\.(to|add)_.*", r"attn2\.to_[qkv]", r"ff\.net\.2", r"norm1\.linear")
PATTERNS += (r"timestep_embedder\.linear_2", "proj_out")


@pytest.mark.parametrize("layout", ["peft", "diffusers"])
def test_an_adapter_of_peft(pipeline, tmp_path, layout):  # noqa: F811
    """Oracle: PEFT's own LoRA (rank 4, alpha 6) in diffusers' pipeline; warm start.

    One layout adapts more layers than the attention's, by `train.lora_targets`.
    """
    folder = pipeline[1]
    targets = TARGETS + MORE if layout == "diffusers" else TARGETS
    loaded = StableDiffusion3Pipeline.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = get_peft_model(
            loaded.transformer,
            LoraConfig(
                r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False
            ),
        )
    if layout == "peft":
        path = tmp_path / "adapter"
        adapted.save_pretrained(path)
        assert json.loads((path / "adapter_config.json").read_text())["lora_alpha"] == 6
    else:
        path = tmp_path / lora_files.DIFFUSERS_FILE
        held = lora_files.Adapter(_weights(adapted), 6.0)
        lora_files.write_diffusers(tmp_path, held)
    loaded.transformer = adapted.merge_and_unload()

    config = lora_config(folder, tmp_path / "cache")
    config.train.lora_rank, config.train.lora_path = 4, str(path)
    if layout == "diffusers":
        config.train.lora_targets = PATTERNS
    model, variables = restore.base(config).model, restore.base(config).variables
    fresh = assemble.trainable_part(config, model, variables)
    started = assemble.warm_start(config, model, jax.device_get(fresh))
    warm = restore.Restored(model, variables | started)
    images = sampling.sample(
        *restore.make_pipeline(config, warm, PROMPTS), len(PROMPTS), 1
    )[:, 0]
    assert_same_images(images, theirs(loaded, config, 4.5))
    assert sd3.adapter(warm.variables, model).rank == 4


def _weights(adapted):
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): value.numpy()
        for name, value in adapted.state_dict().items()
        if "lora_" in name
    }
