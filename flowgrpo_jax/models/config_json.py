"""The config.json of a diffusers or transformers folder, as a dataclass of ours."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from flowgrpo_jax.errors import UserError

Config = TypeVar("Config")


def read(folder: str | Path, name: str = "config.json") -> dict[str, Any]:
    """The keys of `folder`/`name`; UserError if it is missing or no JSON object."""
    path = Path(folder) / name
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"model: {path}: cannot be read ({error.strerror}): a model folder is what "
            "save_pretrained writes"
        ) from error
    except ValueError as error:
        raise UserError(f"model: {path}: is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"model: {path}: holds no JSON object")
    return values


def build(
    config: type[Config],
    values: Mapping[str, Any],
    supported: Mapping[str, Sequence[Any]],
    where: str,
) -> Config:
    """A `config` from the keys that are its fields; absent ones take its defaults.

    So the defaults have to be those of the class that wrote the file. `supported` maps
    keys that change the network, fields or not, to the values implemented here; another
    value, or one of the wrong type, is a UserError that begins with `where`. `dtype`
    is left at its default: the file says how weights are stored, ours how they are used.
    """
    for key, allowed in supported.items():
        if key in values and values[key] not in allowed:
            choices = " or ".join(json.dumps(choice) for choice in allowed)
            raise UserError(
                f"{where}: {key}: {json.dumps(values[key])}: only {choices} is "
                "implemented"
            )
    found = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        if field.name in values and field.name != "dtype":
            value, kind = values[field.name], type(field.default)
            value = tuple(value) if isinstance(value, list) else value
            if kind is float and type(value) is int:
                value = float(value)
            if kind is not type(None) and type(value) is not kind:
                raise UserError(
                    f"{where}: {field.name}: {json.dumps(value)}: must be of the type "
                    f"of {json.dumps(field.default)}"
                )
            found[field.name] = value
    return config(**found)
