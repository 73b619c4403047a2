"""scheduler_config.json of diffusers' FlowMatchEulerDiscreteScheduler.

A key that changes images and is not followed here is refused by its name.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import config_json
from flowgrpo_jax.models.flow_model import Shift

SCHEDULER = "scheduler_config.json"
# Keys of the scheduler that change its sigmas or its steps, with what is implemented.
# diffusers takes a shift_terminal of 0 for none.
_SUPPORTED: dict[str, tuple] = {
    "_class_name": ("FlowMatchEulerDiscreteScheduler",),
    "num_train_timesteps": (1000,),
    "use_dynamic_shifting": (False, True),
    "time_shift_type": ("exponential", "linear"),
    "invert_sigmas": (False,),
    "shift_terminal": (None, 0, 0.0),
    "use_karras_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "stochastic_sampling": (False,),
}
# With their defaults in diffusers.
_NUMBERS = {
    "shift": 1.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256.0,
    "max_image_seq_len": 4096.0,
}
_MOST_SHIFT = 100.0  # released models have 1 to 13; beyond, steps fall together


def shift(folder: Path, image_tokens: int) -> Shift:
    """That of the folder's scheduler_config.json, with diffusers' defaults."""
    held = config_json.read(folder / "scheduler", SCHEDULER)
    return read_shift(held, image_tokens, f"model: {folder / 'scheduler' / SCHEDULER}")


def read_shift(held: Mapping[str, Any], image_tokens: int, where: str) -> Shift:
    """The same from the file's keys; errors begin with `where`."""
    config_json.check_known(held, _SUPPORTED, _NUMBERS, where)
    steps = held.get("num_train_timesteps", 1000)
    if not isinstance(steps, int):  # 1000.0 is equal to it, and diffusers ends in range
        raise UserError(f"{where}: num_train_timesteps: {steps}: must be 1000")
    told = {
        key: config_json.number(held, key, default, where)
        for key, default in _NUMBERS.items()
    }
    dynamic = held.get("use_dynamic_shifting", False)
    value = told["shift"]
    if dynamic:
        few, many = told["base_image_seq_len"], told["max_image_seq_len"]
        if few == many:
            raise UserError(f"{where}: max_image_seq_len: must not be the base's")
        slope = (told["max_shift"] - told["base_shift"]) / (many - few)
        value = told["base_shift"] + slope * (image_tokens - few)
        if held.get("time_shift_type", "exponential") == "exponential":
            value = math.exp(min(value, 2 * math.log(_MOST_SHIFT)))
    if not 1 / _MOST_SHIFT <= value <= _MOST_SHIFT:
        key = "base_shift, max_shift" if dynamic else "shift"
        raise UserError(
            f"{where}: {key}: sigmas are shifted by {value:g}: must be in "
            f"{1 / _MOST_SHIFT:g} ... {_MOST_SHIFT:g}"
        )
    return Shift(value, dynamic)
