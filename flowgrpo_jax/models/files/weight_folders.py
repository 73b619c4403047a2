"""Which .safetensors files of a folder hold its weights: one, or shards by an index.

Names as diffusers, transformers and PEFT write and look for them; a variant (".fp16") is
taken where it is alone.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import config_json
from flowgrpo_jax.models.files.safetensors_files import GGUF, Stored, read_header

FILE, INDEX = ".safetensors", ".safetensors.index.json"
# What is looked for first; of an index and a single file diffusers prefers the index
# and transformers the file.
STEMS = ("diffusion_pytorch_model", "model", "adapter_model")
_ENDINGS = {STEMS[0]: (INDEX, FILE)}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = re.compile(r".*-\d{5}-of-\d{5}(\.[\w-]+)?\.safetensors")


def contents(path: str | Path) -> dict[str, Stored]:
    """All tensors of a .safetensors file, or of a folder with one or with an index."""
    path = Path(path)
    if path.is_file():
        _refuse_others(path)
        return read_header(path).tensors
    if not path.is_dir():
        raise UserError(f"weights: {path}: no such file or folder")
    main = _main_file(path)
    if main.suffix == FILE:
        return read_header(main).tensors
    places = _places(main)
    shards = {}
    for shard in sorted(set(places.values())):
        if not (path / shard).is_file():
            raise UserError(
                f"weights: {path / shard}: the index names this shard; "
                "it is missing: download the folder again"
            )
        shards[shard] = read_header(path / shard).tensors
    for name, shard in places.items():
        if name not in shards[shard]:
            raise UserError(
                f"weights: {path / shard}: tensor {name}: the index places it here, "
                "and it is not here"
            )
    return {name: shards[shard][name] for name, shard in places.items()}


def _places(index: Path) -> dict[str, str]:
    """Tensor to shard, by an index; shards lie beside it."""
    places = config_json.load(index, "weights").get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"weights: {index}: not an index of shards (no weight_map)")
    for name, shard in places.items():
        whole = isinstance(shard, str) and shard and "\0" not in shard
        if not whole or Path(shard).name != shard:
            raise UserError(
                f"weights: {index}: tensor {name}: {shard!r}: must be the name of a "
                "file beside the index"
            )
    return places


def _main_file(folder: Path) -> Path:
    """The index, or else the only file, of the weights in a folder."""
    for found in _candidates(folder):
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found)
            raise UserError(
                f"weights: {folder}: which of {names}? give the file itself"
            )
    held = sorted(file for file in folder.iterdir() if file.is_file())
    if shards := [file for file in held if _SHARD.fullmatch(file.name)]:
        raise UserError(
            f"weights: {folder}: {shards[0].name}: one of several files: the index that "
            "tells what is where (.safetensors.index.json) is missing"
        )
    for file in held:
        _refuse_others(file)
    raise UserError(
        f"weights: {folder}: no .safetensors file in it (other formats are not read)"
    )


def _candidates(folder: Path) -> Iterator[list[Path]]:
    """Files that may hold the weights, the likeliest first; two in a list: a question."""
    for stem in STEMS:
        for ending in _ENDINGS.get(stem, (FILE, INDEX)):
            yield [path for path in (folder / f"{stem}{ending}",) if path.is_file()]
        yield _files(folder, rf"{stem}\.safetensors\.index\.[\w-]+\.json")
        yield _files(folder, rf"{stem}\.[\w-]+\.safetensors(\.index\.json)?")
    yield _files(folder, r".*\.safetensors\.index\.json")
    yield _files(folder, r".*\.safetensors")


def _files(folder: Path, pattern: str) -> list[Path]:
    """The folder's files of such a name, shards left out."""
    return sorted(
        file
        for file in folder.iterdir()
        if re.fullmatch(pattern, file.name)
        and not _SHARD.fullmatch(file.name)
        and file.is_file()
    )


def _refuse_others(file: Path) -> None:
    if file.suffix == ".gguf":
        raise UserError(f"weights: {file}: {GGUF}")
    if file.suffix in _PICKLES:
        raise UserError(
            f"weights: {file}: a pickle, which may run code and is not read: save the "
            "model as .safetensors (safe_serialization=True)"
        )
