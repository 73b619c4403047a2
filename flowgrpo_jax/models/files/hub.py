"""From the name of a model to the folder of its files: an alias, a path or a hub id."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import paths

_WEIGHTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
_SMALL = ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3")
# What a pipeline is read from. The repositories also hold single-file copies of the
# weights and half-precision variants: twice the download.
NEEDED = (
    "model_index.json",
    *(f"{part}/*{end}" for part in _WEIGHTS for end in (".json", ".safetensors")),
    *(f"{part}/*" for part in _SMALL),
)
_NETWORK = "transformer/*.safetensors"  # what another transformer stands in for
SINGLE_FILE = (
    "give it as transformer_path, and as model a diffusers folder or hub id that the "
    "autoencoder and text encoders are taken from"
)
_VARIANTS = ("*.fp16*", "*non_ema*")


def folder(model: str, aliases: Mapping[str, str], transformer: bool = True) -> Path:
    """The diffusers folder of `model`; what is not on this machine is downloaded.

    `aliases`: short names of hub ids. Without `transformer` its weights are not needed.

    `HF_TOKEN` opens gated models, `HF_HUB_OFFLINE=1` keeps to what was downloaded
    before, `HF_HOME` says where that is. UserError if there is no such model.
    """
    local = paths.local(model)
    if local.is_file():
        raise UserError(f"model: {model}: a checkpoint in one file: {SINGLE_FILE}")
    if local.is_dir():
        if not (local / "model_index.json").is_file():
            raise UserError(
                f"model: {model}: a folder without model_index.json: give one that "
                "diffusers' save_pretrained has written"
            )
        return local
    name = aliases.get(model, model)
    if not _may_be_an_id(name):
        raise UserError(
            f"model: {model}: no such folder: must be sprites, words, a .safetensors "
            "file, a diffusers folder, a hub id (owner/name) or one of "
            f"{', '.join(aliases)}"
        )
    needed = [pattern for pattern in NEEDED if transformer or pattern != _NETWORK]
    return _download(f"model: {model}", name, needed)


def files(where: str, path: str, needed: Sequence[str]) -> Path:
    """A file or folder of this machine, or the `needed` files of a hub id.

    Errors begin with `where`, the name of the option that `path` is the value of.
    """
    local = paths.local(path)
    if local.exists():
        return local
    if local.suffix == ".safetensors":
        raise UserError(
            f"{where}: {path}: no such file: docs/rewards.md says how published weights "
            "become one"
        )
    if not _may_be_an_id(path):
        raise UserError(f"{where}: {path}: no such file or folder, nor a hub id")
    return _download(f"{where}: {path}", path, needed)


def _may_be_an_id(name: str) -> bool:
    owner, slash, rest = name.partition("/")
    return bool(slash and owner and rest and "/" not in rest and owner[0] not in ".~")


def _download(where: str, name: str, needed: Sequence[str]) -> Path:
    """The snapshot of a hub id; errors begin with `where`."""
    import huggingface_hub  # half a second that a run of the embedded model spares
    from huggingface_hub import errors

    try:
        snapshot = huggingface_hub.snapshot_download(
            name, allow_patterns=list(needed), ignore_patterns=list(_VARIANTS)
        )
    except errors.GatedRepoError as error:  # a RepositoryNotFoundError as well
        raise UserError(
            f"{where}: gated: click 'Agree and access repository' on "
            f"https://huggingface.co/{name}, then set HF_TOKEN to a token of yours "
            "from https://huggingface.co/settings/tokens"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{where}: the hub has no {name}: check the spelling, or set "
            "HF_TOKEN if it is private"
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"{where}: is no hub id (owner/name)") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise UserError(
            f"{where}: {name} is not downloaded, or not whole, and the hub is "
            "out of reach: check the network, unset HF_HUB_OFFLINE, or give a folder"
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{where}: download failed: {reason}") from error
    return Path(snapshot)
