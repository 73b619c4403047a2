"""The JSON beside the weights of a folder: read for all that it says, or refused.

A key of a config.json is a field of a dataclass of ours, one of `supported` (only these
values are implemented), or one of those that change no result; any other is refused by
its name, unless it is off (null, false or empty).
"""

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from flowgrpo_jax.errors import UserError

Config = TypeVar("Config")

# What the configurations of transformers may hold beside those of the network: what it
# was trained with, what it would generate with, and how it is kept and told about.
BOOKKEEPING = frozenset(
    """architectures attn_implementation auto_map dtype torch_dtype model_type
    transformers_version torchscript use_bfloat16 tf_legacy_loss tokenizer_class
    finetuning_task id2label label2id num_labels problem_type task_specific_params prefix
    return_dict output_attentions output_hidden_states output_scores output_past
    initializer_factor initializer_range attention_dropout dropout dropout_rate
    classifier_dropout hidden_dropout_prob attention_probs_dropout_prob drop_path_rate
    gradient_checkpointing use_cache chunk_size_feed_forward is_encoder_decoder
    is_decoder tie_encoder_decoder tie_word_embeddings bos_token_id pad_token_id
    sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id
    bad_words_ids begin_suppress_tokens suppress_tokens do_sample early_stopping
    num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size num_return_sequences max_length min_length
    remove_invalid_values return_dict_in_generate exponential_decay_length_penalty
    """.split()
)
_LFS = b"version https://git-lfs.github.com/spec/"  # how a pointer begins
_MOST = 2**24  # of any size
_MOST_LAYERS = 1000


def read(folder: str | Path, name: str = "config.json") -> dict[str, Any]:
    """The keys of `folder`/`name`; UserError if it is missing or no JSON object."""
    return load(Path(folder) / name)


def load(path: Path, where: str = "model") -> dict[str, Any]:
    """The keys of a file; errors begin with `where` and the path."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{where}: {path}: cannot be read ({error.strerror}): a model folder is "
            "what save_pretrained writes"
        ) from error
    if is_pointer(data):
        raise UserError(f"{where}: {path}: {POINTER}")
    return parse(data, f"{where}: {path}")


POINTER = "is a git LFS pointer and not the file itself: run `git lfs pull` there"


def is_pointer(start: bytes) -> bool:
    """Whether a file that begins so stands for another, which git LFS has not fetched."""
    return start.startswith(_LFS)


def parse(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object; errors begin with `where`."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{where}: holds no JSON object")
    return values


def of_network(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config.json of diffusers that describe the network.

    What is quantised the tensors tell: diffusers leaves its key when it is undone.
    """
    others = ("_", "quantization_config")
    return {key: values[key] for key in values if not key.startswith(others)}


def build(
    config: type[Config],
    values: Mapping[str, Any],
    supported: Mapping[str, Sequence[Any]],
    where: str,
    harmless: Collection[str] = BOOKKEEPING,
) -> Config:
    """A `config` from the keys that are its fields; absent ones take its defaults.

    So the defaults have to be those of the class that wrote the file. `supported` maps
    keys that change the network, fields or not, to the values implemented here; another
    value, one of the wrong type, or a key that is neither of these nor `harmless`, is a
    UserError that begins with `where`. `dtype` is left at its default: the file says
    how weights are stored, ours how they are used.
    """
    check_known(values, supported, [*_fields(config), *harmless], where)
    hints, found = typing.get_type_hints(config), {}
    for name in _fields(config):
        if name in values:
            found[name] = _value(values[name], hints[name], f"{where}: {name}")
    return config(**found)


def check_known(
    values: Mapping[str, Any],
    supported: Mapping[str, Sequence[Any]],
    known: Collection[str],
    where: str,
) -> None:
    """UserError for a value that is not `supported`, and for a key nobody follows."""
    for key, value in values.items():
        if key in supported:
            if not any(_same(value, choice) for choice in supported[key]):
                choices = " or ".join(json.dumps(choice) for choice in supported[key])
                raise UserError(
                    f"{where}: {key}: {_told(value)}: only {choices} is implemented"
                )
        elif key not in known and not key.startswith("_") and not _off(value):
            raise UserError(
                f"{where}: {key}: {_told(value)}: not followed here: only a file "
                "without this key can be used"
            )


def number(values: Mapping[str, Any], key: str, default: float, where: str) -> float:
    """A finite number; UserError for anything else."""
    return _value(values.get(key, default), float, f"{where}: {key}")


def numbers(
    values: Mapping[str, Any], key: str, default: Sequence[float], where: str
) -> tuple[float, ...]:
    """As many finite numbers as the default has; UserError for anything else."""
    found = values.get(key, list(default))
    if not isinstance(found, list) or len(found) != len(default):
        raise UserError(
            f"{where}: {key}: {_told(found)}: must be {len(default)} numbers"
        )
    return tuple(_value(value, float, f"{where}: {key}") for value in found)


def _fields(config: type) -> list[str]:
    names = [field.name for field in dataclasses.fields(config)]
    return [name for name in names if name != "dtype"]


def _value(value: Any, hint: Any, where: str) -> Any:
    """`value` in the type of a field; UserError if it is of another, or out of range."""
    if not _fits(value, hint):
        kind = hint.__name__ if isinstance(hint, type) else str(hint)
        raise UserError(f"{where}: {_told(value)}: must be of the type {kind}")
    if hint is not float:
        _check_sizes(value, where)
    if isinstance(value, list):
        return tuple(value)
    return float(value) if hint is float else value


def _check_sizes(value: Any, where: str) -> None:
    """UserError for whole numbers that no network has: they would only fail later."""
    least = int(type(value) is int and not where.endswith("_id"))
    most = _MOST_LAYERS if where.endswith("layers") else _MOST
    for size in value if isinstance(value, list) else [value]:
        if type(size) is int and not least <= size <= most:
            raise UserError(f"{where}: {_told(value)}: must be in {least} ... {most}")


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        of = typing.get_args(hint)[0]
        return isinstance(value, list) and all(_fits(item, of) for item in value)
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is hint


def _same(value: Any, choice: Any) -> bool:
    """Equal, and not merely as 1 is to true."""
    return value == choice and isinstance(value, bool) == isinstance(choice, bool)


def _off(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _told(value: Any) -> str:
    """A value of a file in a line of ours, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
