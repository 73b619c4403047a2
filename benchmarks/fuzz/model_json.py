"""scheduler_config.json, the config.json of every network, model_index.json.

Oracles: of a scheduler the sigmas of diffusers' own set_timesteps; of a network the
class that wrote the file: it must take what is accepted, with the values that we took,
and whatever else it was told must be without effect on an image.
"""

import inspect
import json
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3 as sd3
from hypothesis import strategies as st

from benchmarks.fuzz import core
from flowgrpo_jax.flow import schedule
from flowgrpo_jax.models.encoders.clip import CLIPTextConfig
from flowgrpo_jax.models.encoders.t5 import T5Config
from flowgrpo_jax.models.files import config_json, pipeline_index, scheduler
from flowgrpo_jax.models.sd3 import folder as sd3_folder
from flowgrpo_jax.models.sd3.transformer_config import MMDiTConfig
from flowgrpo_jax.models.vae import VAEConfig

STEPS, TOKENS = 8, 1024
UNKNOWN = ("quantization_config", "a_new_key")
SCHEDULER = diffusers.FlowMatchEulerDiscreteScheduler
ODD = st.sampled_from(
    [None, True, False, 0, 1, -1, 2.5, 1e300, math.nan, math.inf, 10**400, "", "x"]
) | st.sampled_from([[], {}, [1], {"a": 1}, [[0]], "0.5", 10**9, 1000.0])
NUMBERS = st.floats(0.005, 150) | st.integers(1, 5000)
SCHEDULER_KEYS = {
    key: NUMBERS
    if isinstance(value.default, int | float) and not isinstance(value.default, bool)
    else st.booleans()
    for key, value in inspect.signature(SCHEDULER.__init__).parameters.items()
    if key != "self"
} | {
    "num_train_timesteps": st.sampled_from([1000, 1000, 999, 4]),
    "time_shift_type": st.sampled_from(["exponential", "linear", "cubic"]),
    "shift_terminal": st.sampled_from([None, 0.0, 0.1]),
    "_class_name": st.sampled_from([SCHEDULER.__name__, "UniPCMultistepScheduler"]),
    "flow_shift": NUMBERS,
    "_diffusers_version": st.text(max_size=3),
}
# Reader, class that writes the file, keys beside the fields of ours that have no effect
# on an image.
NETWORKS: dict[str, tuple[Any, Any, set[str]]] = {
    "transformer": (
        MMDiTConfig,
        diffusers.SD3Transformer2DModel,
        {"caption_projection_dim"},
    ),
    "vae": (VAEConfig, diffusers.AutoencoderKL, {"sample_size", "force_upcast"}),
    "text_encoder": (
        CLIPTextConfig,
        transformers.CLIPTextConfig,
        {
            *("attention_dropout", "initializer_range", "initializer_factor"),
            *("pad_token_id", "bos_token_id"),
        },
    ),
    "text_encoder_3": (
        T5Config,
        transformers.T5Config,
        {
            *("dropout_rate", "initializer_factor", "use_cache", "pad_token_id"),
            *("eos_token_id", "classifier_dropout", "is_decoder", "num_decoder_layers"),
            *("scale_decoder_outputs", "tie_word_embeddings"),
        },
    ),
}
# What every network is begun with, so that many of the drawn ones can be.
BASES: dict[str, dict[str, Any]] = {
    "transformer": {"num_layers": 2, "caption_projection_dim": 1152},
    "vae": {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    },
    "text_encoder": {"num_hidden_layers": 1},
    "text_encoder_3": {"num_layers": 1},
}
SOME = st.integers(1, 4) | st.sampled_from([8, 16, 32, 64]) | ODD | st.floats(0, 2)


def _keys(name: str) -> list[str]:
    """Of the class that writes the file, with two that nobody knows."""
    if name in ("transformer", "vae"):
        known = set(inspect.signature(NETWORKS[name][1].__init__).parameters)
    else:
        known = set(NETWORKS[name][1]().to_dict())
    return [*sorted(known - {"self"}), *UNKNOWN]


KEYS = {name: _keys(name) for name in NETWORKS}


@st.composite
def _files(draw) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from(["scheduler", "scheduler", "index", *NETWORKS]))
    if name == "scheduler":
        values = draw(st.fixed_dictionaries({}, optional=SCHEDULER_KEYS))
        quiet = draw(st.booleans())  # without most of what is refused
        values = {k: v for k, v in values.items() if not quiet or v is not True}
        if draw(st.booleans()):
            values[draw(st.sampled_from([*SCHEDULER_KEYS, "unknown"]))] = draw(ODD)
        return name, values
    if name == "index":
        entry = st.tuples(st.just("diffusers"), st.text(max_size=3)).map(list) | ODD
        part = st.sampled_from([*INDEX, "controlnet"])
        return name, INDEX | draw(st.dictionaries(part, entry, max_size=2))
    changed = st.dictionaries(st.sampled_from(KEYS[name]), SOME, max_size=3)
    return name, BASES[name] | draw(changed)


INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusion3Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def check(given: tuple[str, dict[str, Any]]) -> str:
    name, values = given
    with tempfile.TemporaryDirectory() as folder:
        if name == "scheduler":
            return _check_scheduler(json.dumps(values).encode(), Path(folder))
        if name == "index":
            (Path(folder) / pipeline_index.INDEX).write_text(json.dumps(values))
            with core.refused() as lines:
                sd3_folder.check_index(Path(folder))
            for part, entry in values.items() if not lines else ():
                none = part.endswith("_3") and entry == [None, None]
                unknown = part not in INDEX and entry in (None, False, "", [], {})
                if entry != INDEX.get(part) and not none and not unknown:
                    raise core.Wrong(f"{part}: {entry}: a part of another class")
            return core.REFUSED if lines else core.RIGHT
        (Path(folder) / "config.json").write_text(json.dumps(values))
        return _check_network(name, Path(folder))


def _check_scheduler(data: bytes, folder: Path) -> str:
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / scheduler.SCHEDULER).write_bytes(data)
    with core.refused() as lines:
        shift = scheduler.shift(folder, TOKENS)
        ours = schedule.shifted_grid(STEPS, shift.value, shift.dynamic)
    if lines:
        return core.REFUSED
    held = json.loads(data)
    try:
        theirs = _their_sigmas(held)
    except Exception as error:
        raise core.Wrong(f"diffusers refuses it: {error}") from error
    if not np.allclose(ours, theirs, rtol=1e-5, atol=2e-5):
        raise core.Wrong(f"sigmas {ours}, diffusers {theirs}")
    if held.get("stochastic_sampling"):
        raise core.Wrong("steps are stochastic in diffusers")
    return core.RIGHT


def _their_sigmas(held: dict[str, Any]) -> np.ndarray:
    scheduler = SCHEDULER.from_config(held)
    assert held.get("_class_name", SCHEDULER.__name__) == SCHEDULER.__name__
    config, mu = scheduler.config, {}
    if config.get("use_dynamic_shifting"):
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = {"mu": sd3.calculate_shift(TOKENS, *(config[name] for name in names))}
    scheduler.set_timesteps(STEPS, **mu)
    return scheduler.sigmas.numpy()


def _check_network(name: str, folder: Path) -> str:
    reader, writer, harmless = NETWORKS[name]
    with core.refused() as lines:
        ours = reader.from_folder(folder)
    if lines:
        return core.REFUSED
    # transformers checks types of what has no effect too, and takes no 1 for 1.0.
    held = {
        key: float(value) if type(vars(ours).get(key)) is float else value
        for key, value in config_json.read(folder).items()
        if key not in harmless
        and key not in config_json.BOOKKEEPING
        and (value or key not in UNKNOWN)  # off
    }
    try:
        theirs, defaults = _their_config(writer, held)
    except Exception as error:
        raise core.Wrong(f"its own class refuses it: {error}") from error
    fields = vars(ours)
    for key, value in theirs.items():
        if key in fields and key != "dtype":
            own = fields[key]
            own = list(own) if isinstance(own, tuple) else own
            value = list(value) if isinstance(value, tuple) else value
            if own != value and not (key == "out_channels" and value is None):
                if key == "projection_dim":  # None without the class that projects
                    continue
                if key == "dual_attention_layers" and own == sorted(value or []):
                    continue
                raise core.Wrong(f"{key}: {own}, the class has {value}")
        elif key not in harmless and value != defaults[key]:
            if key.endswith("block_types") or key in ("dense_act_fn", "is_gated_act"):
                continue  # told by other keys; the readers compare them
            raise core.Wrong(f"{key}: {value}: accepted, and not followed")
    return core.RIGHT


def _their_config(writer: Any, held: dict[str, Any]) -> tuple[dict, dict]:
    """The class's values of its own keys with this file, and its defaults."""
    if issubclass(writer, torch.nn.Module):
        with torch.device("meta"):
            made = writer.from_config(held)
        signature = inspect.signature(writer.__init__).parameters
        defaults = {k: p.default for k, p in signature.items() if k != "self"}
        return {key: made.config[key] for key in defaults}, defaults
    common = transformers.PretrainedConfig().to_dict()
    defaults = {k: v for k, v in writer().to_dict().items() if k not in common}
    made = writer(**held).to_dict()
    return {key: made[key] for key in defaults}, defaults


def check_bytes(data: bytes) -> str:
    """The bytes as scheduler_config.json."""
    with tempfile.TemporaryDirectory() as folder:
        return _check_scheduler(data, Path(folder))


def _seeds() -> list[bytes]:
    found = [{}, {"shift": 3.0}, {"use_dynamic_shifting": True, "max_shift": 1.2}]
    found += [{"use_karras_sigmas": True}, {"time_shift_type": "linear", "shift": 2}]
    return [json.dumps(values).encode() for values in found]


def surface() -> core.Surface:
    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    return core.Surface("model_json", _files(), check, _seeds(), check_bytes)
