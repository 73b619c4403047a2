"""One LoRA of all linear layers in the layouts that people have, for tests.

Layers have ranks and alphas of their own. Layers that are one in the original
checkpoint share A, so that one fused layer can say the same; and all values have few
bits, so that half precision can.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from flowgrpo_jax.models.files.original_names import OriginalNames

RANK = 4


class Layer(NamedTuple):
    """Of diffusers' transformer: what PEFT makes of it is strength * B @ A."""

    a: torch.Tensor  # [rank, in]
    b: torch.Tensor  # [out, rank]
    alpha: float


class Source(NamedTuple):
    """What a layout is made from."""

    layers: dict[str, Layer]
    fused: dict[str, tuple[str, ...]]  # original name -> layers of diffusers
    swapped: frozenset[str]
    pipeline: object
    strength: float


def source(pipeline, names: OriginalNames, strength: float) -> Source:
    """A LoRA of every linear layer of a pipeline's transformer; most have `strength`."""
    linear = {
        name: module
        for name, module in pipeline.transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    numbers = {part for name in linear for part in name.split(".") if part.isdigit()}
    fused = {}
    for name, parts in names.layers.items():
        for number in numbers if "{layer}" in name else ("",):
            modules = tuple(part.replace("{layer}", number) for part in parts)
            if "processor" not in name and all(module in linear for module in modules):
                fused[name.replace("{layer}", number)] = modules
    draw = torch.Generator().manual_seed(0)

    def few_bits(*shape):
        return torch.randint(-24, 25, shape, generator=draw) / 128

    layers = {}
    for modules in fused.values():
        # As a rank of its own, and an alpha that is not that of the others.
        rank = RANK // 2 if modules[0].endswith("ff.net.2") else RANK
        a = few_bits(rank, linear[modules[0]].in_features)
        for module in modules:
            b = few_bits(linear[module].out_features, rank)
            layers[module] = Layer(a, b, strength * RANK)
    assert layers.keys() == linear.keys()
    return Source(layers, fused, names.swapped, pipeline, strength)


def config(given: Source, **options) -> LoraConfig:
    """PEFT's, for these layers."""
    return LoraConfig(
        target_modules=sorted(given.layers),
        init_lora_weights=False,
        **dict(r=RANK, lora_alpha=given.strength * RANK) | options,
    )


def fill(model, given: Source, scale=None) -> None:
    """These factors into an adapter of that config; B times `scale` of its layer."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" not in name:
                continue
            module, _, rest = name.partition(".lora_")
            layer = given.layers[module.removeprefix("base_model.model.")]
            value = layer.a if rest[0] == "A" else layer.b
            assert parameter.shape == value.shape
            parameter.copy_(value * (scale(layer) if scale and rest[0] == "B" else 1))


RANKS = {"ff.net.2": RANK // 2}


def adapted(given: Source):
    """The pipeline's transformer with the adapter in it, as PEFT has it."""
    transformer = given.pipeline.transformer
    transformer.add_adapter(config(given, rank_pattern=RANKS))
    fill(transformer, given)
    return transformer


# -- layouts: (folder, Source) -> a file, or a folder -----------------------------------


def pipeline_file(folder: Path, given: Source) -> Path:
    transformer = adapted(given)
    type(given.pipeline).save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    given.pipeline.unload_lora_weights()
    return folder


def transformer_file(folder: Path, given: Source) -> Path:
    adapted(given).save_lora_adapter(folder)
    given.pipeline.unload_lora_weights()
    return folder


def peft_folder(folder: Path, given: Source) -> Path:
    """By patterns: a rank and an alpha of their own, for the names' ends."""
    made = config(
        given,
        lora_alpha=1,
        rank_pattern=RANKS,
        alpha_pattern={r".*\w": given.strength * RANK},
    )
    return _peft(folder, given, made)


def peft_rslora(folder: Path, given: Source) -> Path:
    """alpha / sqrt(rank): what is left of a layer's strength goes into B."""
    made = config(given, use_rslora=True, rank_pattern=RANKS)
    return _peft(folder, given, made, lambda layer: len(layer.a) ** -0.5)


def _peft(folder, given, made, scale=None):
    model = get_peft_model(given.pipeline.transformer, made)
    fill(model, given, scale)
    model.save_pretrained(folder)
    model.unload()
    return folder


def _file(folder: Path, tensors, header=None) -> Path:
    path = folder / "lora.safetensors"
    held = {
        name: torch.as_tensor(value).contiguous() for name, value in tensors.items()
    }
    save_file({name: value.clone() for name, value in held.items()}, path, header)
    return path


def _factors(pattern: str, layers: dict[str, Layer], kind=torch.float32, alpha=True):
    """Tensors by name; without `alpha` what is left of the strength is in B."""
    words, tensors = {"A": "down", "B": "up"}, {}
    for name, layer in layers.items():
        rest = 1 if alpha else layer.alpha / len(layer.a)
        named = pattern.format(name=name, joined=name.replace(".", "_"))
        for letter, value in (("A", layer.a), ("B", layer.b * rest)):
            ending = named.replace("(AB)", letter).replace("(downup)", words[letter])
            tensors[ending] = value.to(kind)
        if alpha:
            base = named.partition(".lora_")[0]
            tensors[f"{base}.alpha"] = torch.tensor(layer.alpha, dtype=kind)
    return tensors


def alphas_beside(folder: Path, given: Source) -> Path:
    pattern = "transformer.{name}.lora_(AB).weight"
    return _file(folder, _factors(pattern, given.layers))


def alphas_and_header(folder: Path, given: Source) -> Path:
    told = config(given, rank_pattern=RANKS).to_dict()
    told["target_modules"] = sorted(given.layers)
    held = {f"transformer.{key}": value for key, value in told.items()}
    pattern = "transformer.{name}.lora_(AB).weight"
    header = {"lora_adapter_metadata": json.dumps(held, default=str)}
    return _file(folder, _factors(pattern, given.layers), header)


def ai_toolkit(folder: Path, given: Source) -> Path:
    """alpha is the rank, and nothing says so; bf16."""
    pattern = "transformer.{name}.lora_(AB).weight"
    tensors = _factors(pattern, given.layers, torch.bfloat16, alpha=False)
    return _file(folder, tensors, {"ss_network_alpha": "999", "format": "pt"})


def one_trainer(folder: Path, given: Source) -> Path:
    pattern = "lora_transformer_{joined}.lora_(downup).weight"
    return _file(folder, _factors(pattern, given.layers))


def kohya(folder: Path, given: Source) -> Path:
    """fp16, by the original names: query, key and value are one layer."""
    pattern = "lora_unet_{joined}.lora_(downup).weight"
    return _file(folder, _factors(pattern, fused(given), torch.float16))


def kohya_split(folder: Path, given: Source) -> Path:
    """The same, trained with split_qkv: factors of several, with zeros between them."""
    pattern = "lora_unet_{joined}.lora_(downup).weight"
    return _file(folder, _factors(pattern, fused(given, apart=True)))


def comfyui(folder: Path, given: Source) -> Path:
    pattern = "diffusion_model.{name}.lora_(AB).weight"
    return _file(folder, _factors(pattern, fused(given)))


def comfyui_plain(folder: Path, given: Source) -> Path:
    pattern = "diffusion_model.{name}.lora_(AB).weight"
    return _file(folder, _factors(pattern, fused(given), alpha=False))


def fused(given: Source, apart: bool = False) -> dict[str, Layer]:
    """The layers of the original checkpoint."""
    found = {}
    for name, modules in given.fused.items():
        parts = [given.layers[module] for module in modules]
        a, b, alpha = parts[0].a, torch.cat([part.b for part in parts]), parts[0].alpha
        if modules[0] in given.swapped:
            b = torch.cat(b.chunk(2)[::-1])
        if apart and len(parts) > 1:
            # alpha is divided by the rank of all: so do all who read such files.
            a = torch.cat([part.a for part in parts])
            b = torch.block_diag(*[part.b for part in parts])
            alpha *= len(parts)
        found[name] = Layer(a, b, alpha)
    return found


LAYOUTS: dict[str, Callable[[Path, Source], Path]] = {
    "diffusers' pipeline": pipeline_file,
    "diffusers' transformer": transformer_file,
    "PEFT, patterns": peft_folder,
    "PEFT, rsLoRA": peft_rslora,
    "diffusers' names and alphas": alphas_beside,
    "alphas and a header": alphas_and_header,
    "ai-toolkit": ai_toolkit,
    "OneTrainer": one_trainer,
    "kohya": kohya,
    "kohya, split_qkv": kohya_split,
    "ComfyUI": comfyui,
    "ComfyUI, no alpha": comfyui_plain,
}


def numpy_of(value: torch.Tensor) -> np.ndarray:
    return value.detach().numpy()
