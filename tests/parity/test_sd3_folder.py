"""What stands beside the networks of a folder, against diffusers' own reading of it."""

import json

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3 as sd3

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import schedule
from flowgrpo_jax.models.files import pipeline_index, scheduler
from flowgrpo_jax.models.sd3 import folder as sd3_folder

STEPS, TOKENS = 10, 1024


def theirs(options):
    """The sigmas of diffusers' SD3 pipeline with a scheduler of these options."""
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    held, mu = scheduler.config, {}
    if held["use_dynamic_shifting"]:
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = {"mu": sd3.calculate_shift(TOKENS, *(held[name] for name in names))}
    scheduler.set_timesteps(STEPS, **mu)
    return scheduler.sigmas.numpy()


@pytest.fixture
def folder(tmp_path):
    """Writes scheduler_config.json with these keys over diffusers' own."""
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path / "scheduler")
    path = tmp_path / "scheduler" / scheduler.SCHEDULER

    def write(**options):
        path.write_text(json.dumps(json.loads(path.read_text()) | options))
        return tmp_path

    return write


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shift": 1.0},
        {"shift": 13},
        {"shift": 0.05, "shift_terminal": 0.0},
        {"base_shift": 0.7, "max_shift": 2.0},  # not looked at without the next key
        {"use_dynamic_shifting": True, "base_shift": 0.7, "max_shift": 2.0},
        {"use_dynamic_shifting": True, "max_image_seq_len": 1500},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"_use_default_values": ["shift"]},
    ],
)
def test_sigmas_are_those_of_diffusers(folder, options):
    """Oracle: set_timesteps of diffusers' scheduler, as its SD3 pipeline calls it."""
    found = scheduler.shift(folder(**options), TOKENS)
    sigmas = schedule.shifted_grid(STEPS, found.value, found.dynamic)
    known = {key: options[key] for key in options if key[0] != "_"}
    expected = theirs({"shift": 3.0} | known)
    np.testing.assert_allclose(sigmas, expected, rtol=3e-6, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"invert_sigmas": True},
        {"shift_terminal": 0.1},
        {"num_train_timesteps": 500},
        {"use_dynamic_shifting": True, "shift_terminal": 0.02},
    ],
)
def test_other_sigmas_are_refused_by_name(folder, options):
    """Oracle: diffusers, whose sigmas are others with this key."""
    (key,) = options.keys() - {"use_dynamic_shifting"}
    with pytest.raises(UserError, match=f"{scheduler.SCHEDULER}: {key}: "):
        scheduler.shift(folder(**options), TOKENS)
    plain = {key: value for key, value in options.items() if "dynamic" in key}
    assert np.abs(theirs(options) - theirs(plain)).max() > 1e-4


@pytest.mark.parametrize(
    "options, key",
    [
        ({"stochastic_sampling": True}, "stochastic_sampling"),
        ({"num_train_timesteps": 1000.0}, "num_train_timesteps"),
        ({"time_shift_type": "cubic"}, "time_shift_type"),
        ({"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0}, "_class_name"),
        ({"flow_shift": 3.0}, "flow_shift"),
        ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type"),
        ({"shift": None}, "shift"),
        ({"shift": "3.0"}, "shift"),
        ({"shift": True}, "shift"),
        ({"shift": float("nan")}, "shift"),
        ({"shift": 0}, "shift"),
        ({"shift": -3.0}, "shift"),
        ({"shift": 1e30}, "shift"),
        ({"shift": 10**400}, "shift"),
        ({"use_dynamic_shifting": 1}, "use_dynamic_shifting"),
        ({"use_dynamic_shifting": True, "max_shift": 1e9}, "base_shift, max_shift"),
        ({"use_dynamic_shifting": True, "max_image_seq_len": 256}, "max_image_seq_len"),
        ({"base_image_seq_len": [256]}, "base_image_seq_len"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(folder, options, key):
    """Oracle: the line begins with the file and the key; shorter than a screen."""
    with pytest.raises(UserError, match=f"{scheduler.SCHEDULER}: {key}: ") as caught:
        scheduler.shift(folder(**options), TOKENS)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "feature_extractor": [None, None],
    "image_encoder": ["transformers", "SiglipVisionModel"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": [None, None],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizerFast"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@pytest.mark.parametrize(
    "change, key",
    [
        ({}, None),
        ({"_class_name": "FluxPipeline"}, "_class_name"),
        ({"scheduler": ["diffusers", "UniPCMultistepScheduler"]}, "scheduler"),
        ({"text_encoder": [None, None]}, "text_encoder"),
        ({"text_encoder_3": ["transformers", "UMT5EncoderModel"]}, "text_encoder_3"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "vae"),
        ({"vae": 3}, "vae"),
        ({"tokenizer_3": ["transformers"]}, "tokenizer_3"),
        ({"controlnet": ["diffusers", "SD3ControlNetModel"]}, "controlnet"),
    ],
)
def test_parts_of_another_class_are_refused_by_name(tmp_path, change, key):
    """Oracle: the classes that are implemented; the line names file and part."""
    (tmp_path / pipeline_index.INDEX).write_text(json.dumps(INDEX | change))
    if key is None:
        assert sd3_folder.check_index(tmp_path) is None
        return
    with pytest.raises(UserError, match=f"{pipeline_index.INDEX}: {key}: "):
        sd3_folder.check_index(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is not JSON"),
        ('{"a": ', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
        ("[]", "holds no JSON object"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a git LFS"),
    ],
)
def test_broken_json_is_one_line(tmp_path, text, message):
    """Oracle: the line, by hand; it names the file."""
    path = tmp_path / pipeline_index.INDEX
    path.write_text(text)
    with pytest.raises(UserError, match=f"model: {path}: {message}") as caught:
        sd3_folder.check_index(tmp_path)
    assert "\n" not in str(caught.value)
