"""Weights of few bits: fp8, scaled or not, is read; what else there is is refused.

A scaled fp8 file holds a factor beside a layer's weight: weight = fp8 * factor. ComfyUI
calls it `weight_scale`, and `scale_weight` in files of before 2026. Beside them are
scales of the inputs, for products in fp8, which are not made here, and marks that tell
how a layer is quantised.
"""

import json
from collections.abc import Collection, Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import config_json
from flowgrpo_jax.models.files.safetensors_files import DTYPES, Stored, read_header

_FP8 = (DTYPES["F8_E4M3"], DTYPES["F8_E5M2"])
_SCALES = ("weight_scale", "scale_weight")
_LAYER_MARK, _FILE_MARK = "comfy_quant", "scaled_fp8"
_BESIDE = ("input_scale", "scale_input", _LAYER_MARK)
_IN_METADATA = "_quantization_metadata"  # the marks of all layers
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
# The second: how ComfyUI would multiply with the weights.
_KNOWN = ("format", "full_precision_matrix_mult")
_CONVERT = (
    "save its folder as bf16 with the AutoModel of diffusers (of transformers for a text "
    "encoder), in Python: AutoModel.from_pretrained(FOLDER, torch_dtype=torch.bfloat16)"
    ".dequantize().save_pretrained(NEW)"
)


def with_scales(
    found: Mapping[str, Stored], wanted: Collection[str]
) -> dict[str, Stored]:
    """The tensors of a file; those `wanted` with their scale, if one is beside them.

    What stands beside these is left out. UserError, naming the tensor, for wanted
    weights that are quantised in another way.
    """
    for name in wanted:
        if name in found:
            _check_plain(name, found)
    if not any(found[name].dtype in _FP8 for name in wanted if name in found):
        return dict(found)
    for layer, where, mark in _marks(found):
        if any(name.endswith(f"{layer}.weight") for name in wanted):
            _check_mark(where, mark)
    rest, scales = {}, {}
    for name, tensor in found.items():
        layer, _, kind = name.rpartition(".")
        weight = f"{layer}.weight"
        scaled = weight in wanted and weight in found and found[weight].dtype in _FP8
        if scaled and kind in _SCALES:
            if weight in scales:
                raise UserError(
                    f"weights: {tensor.file}: tensor {name}: a second scale of {weight}"
                )
            scales[weight] = _scale(name, tensor, found[weight])
        elif kind != _FILE_MARK and not (scaled and kind in _BESIDE):
            rest[name] = tensor
    return rest | {name: rest[name]._replace(scale=scales[name]) for name in scales}


def _check_plain(name: str, found: Mapping[str, Stored]) -> None:
    """UserError for weights that are neither numbers nor scaled ones."""
    layer, tensor = name.removesuffix(".weight"), found[name]
    if f"{name}.absmax" in found or f"{layer}.SCB" in found:
        raise UserError(
            f"weights: {tensor.file}: tensor {name}: quantised by bitsandbytes, which "
            f"is not read: {_CONVERT}"
        )
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise UserError(
            f"weights: {tensor.file}: tensor {name}: whole numbers ({tensor.dtype}) in "
            "place of weights: quantised in a way that is not read: take a file in "
            "bf16, fp16, fp32 or fp8"
        )


def _scale(name: str, scale: Stored, weight: Stored) -> np.ndarray:
    """One number, or one a row of the weight, as an array that multiplies it."""
    count, rest = int(np.prod(scale.shape)), (1,) * (len(weight.shape) - 1)
    alone = not any(size > 1 for size in scale.shape[1:])
    numbers = jnp.issubdtype(scale.dtype, jnp.floating)
    if not numbers or count != 1 and not (alone and count == weight.shape[0]):
        raise UserError(
            f"weights: {scale.file}: tensor {name}: {scale.dtype}{list(scale.shape)}: "
            f"only one scale, or one a row, is read (of weights {list(weight.shape)})"
        )
    return np.asarray(scale.map(), np.float32).reshape(count, *rest)


def _marks(found: Mapping[str, Stored]) -> Iterator[tuple[str, str, object]]:
    """(layer, where it is told, how it is quantised), from tensors and from headers."""
    for name, tensor in found.items():
        layer, _, kind = name.rpartition(".")
        if kind == _LAYER_MARK:
            where = f"weights: {tensor.file}: tensor {name}"
            yield layer, where, config_json.parse(tensor.map().tobytes(), where)
    for file in {tensor.file for tensor in found.values()}:
        held = read_header(file).metadata.get(_IN_METADATA, "{}")
        where = f"weights: {file}: {_IN_METADATA}"
        layers = config_json.parse(held, where).get("layers", {})
        if not isinstance(layers, dict):
            raise UserError(f"{where}: layers: must be an object")
        for layer, mark in layers.items():
            yield layer, f"{where}: {layer}", mark


def _check_mark(where: str, mark: object) -> None:
    """UserError for a layer that is more than fp8 numbers and a scale."""
    told = mark if isinstance(mark, dict) else {"format": mark}
    if told.get("format") not in _FORMATS:
        raise UserError(
            f"{where}: format {json.dumps(told.get('format'))}: only "
            f"{' and '.join(_FORMATS)} are read"
        )
    for key in told.keys() - set(_KNOWN):
        if told[key]:
            raise UserError(f"{where}: {key}: {json.dumps(told[key])}: not followed")
