"""model_index.json of a diffusers folder: which class reads which part."""

from collections.abc import Collection, Mapping
from pathlib import Path

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import config_json

INDEX = "model_index.json"
# Class names that a part may have; None where it may be missing.
Parts = Mapping[str, tuple[str | None, ...]]


def check(
    folder: Path, pipelines: tuple[str, ...], parts: Parts, unused: Collection[str]
) -> None:
    """UserError, naming the part, for a pipeline that is not one of these.

    `unused`: parts that may be there and are not read.
    """
    path = folder / INDEX
    held, where = config_json.read(folder, INDEX), f"model: {path}"
    config_json.check_known(held, {"_class_name": pipelines}, (*parts, *unused), where)
    for part, classes in parts.items():
        entry = held.get(part, [None, None])
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] not in classes:
            choices = " or ".join(str(name) for name in classes if name)
            raise UserError(f"{where}: {part}: {entry}: must be of class {choices}")
