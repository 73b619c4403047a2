"""Names of the original checkpoints against the converters of diffusers.

A LoRA by the original names changes the weights of the original checkpoint. What
diffusers makes of that change is what it must be here.
"""

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders import lora_conversion_utils, single_file_utils

from flowgrpo_jax.models.files.lora_files import Factors
from flowgrpo_jax.models.files.lora_names import LayerNames
from flowgrpo_jax.models.flux import original_names as flux_names
from flowgrpo_jax.models.flux.presets import TRANSFORMERS as FLUX
from flowgrpo_jax.models.sd3 import original_names as sd3_names
from flowgrpo_jax.models.sd3.presets import TRANSFORMERS as SD3

IN, RANK = 3, 2  # a converter looks at the rows of a matrix alone
STRENGTH = 0.75


def of_flux(name):
    held = FLUX[name] | {"num_layers": 2, "num_single_layers": 2}
    return shapes_of(FluxTransformer2DModel, held), flux_names.NAMES


def of_sd3(name):
    held = SD3[name] | {"num_layers": 3}
    if held.get("dual_attention_layers"):
        held["dual_attention_layers"] = (0, 1)
    return shapes_of(SD3Transformer2DModel, held), sd3_names.names(3)


def shapes_of(kind, held):
    """[out, IN] of every linear layer of diffusers' transformer."""
    with torch.device("meta"):
        model = kind(**{key: held[key] for key in held if key[0] != "_"})
    return {
        name: (module.out_features, IN)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def originals(shapes, names):
    """(name in the checkpoint, its rows) of every layer that the transformer has."""
    for name, parts in names.layers.items():
        for number in "012" if "{layer}" in name else "0":
            modules = [part.replace("{layer}", number) for part in parts]
            if all(module in shapes for module in modules):
                rows = sum(shapes[module][0] for module in modules)
                yield name.replace("{layer}", number), rows


def factors_of(name, rows, rank=RANK):
    rng = np.random.default_rng(len(name) + rows)
    a, b = rng.standard_normal((rank, IN)), rng.standard_normal((rows, rank))
    return Factors(a.astype(np.float32), b.astype(np.float32), STRENGTH)


def change(layer):
    return layer.strength * layer.b @ layer.a


NORMS = {
    "double_blocks": ("img_attn.norm.query_norm.scale", "img_attn.norm.key_norm.scale")
    + ("txt_attn.norm.query_norm.scale", "txt_attn.norm.key_norm.scale"),
    "single_blocks": ("norm.query_norm.scale", "norm.key_norm.scale"),
    "joint_blocks": ("x_block.attn.ln_q.weight", "x_block.attn.ln_k.weight")
    + ("context_block.attn.ln_q.weight", "context_block.attn.ln_k.weight"),
    "dual": ("x_block.attn2.ln_q.weight", "x_block.attn2.ln_k.weight"),
}
OUTER = ("pos_embed", "x_embedder.proj.weight", "x_embedder.proj.bias")


@pytest.mark.parametrize(
    "of, name, convert",
    [
        (
            of_flux,
            name,
            single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
        )
        for name in FLUX
    ]
    + [
        (
            of_sd3,
            name,
            single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
        )
        for name in SD3
    ],
)
def test_a_change_of_the_original_checkpoint(of, name, convert):
    """Oracle: diffusers' converter of single files, on the product of the factors.

    All linear layers: what fused ones are split into, and halves that change places.
    """
    shapes, names = of(name)
    checkpoint, found, layers = {}, {}, LayerNames(shapes, names)
    for layer, rows in originals(shapes, names):
        if "processor" in layer:  # XLabs's second names of some
            continue
        factors = factors_of(layer, rows)
        checkpoint[f"{layer}.weight"] = torch.from_numpy(change(factors))
        checkpoint[f"{layer}.bias"] = torch.zeros(rows)
        parts = dict(layers.split(layer, factors, "x"))
        assert not parts.keys() & found.keys()
        found |= parts
    for block in {
        ".".join(key.split(".")[:2]) for key in checkpoint if "blocks" in key
    }:
        dual = any(key.startswith(f"{block}.x_block.attn2") for key in checkpoint)
        for norm in NORMS[block.partition(".")[0]] + NORMS["dual"] * dual:
            checkpoint[f"{block}.{norm}"] = torch.ones(1)
    checkpoint |= dict.fromkeys(OUTER, torch.zeros(1))
    converted = {
        key.removesuffix(".weight"): value.numpy()
        for key, value in convert(checkpoint).items()
        if key.endswith(".weight") and key.removesuffix(".weight") in shapes
    }
    assert found.keys() == converted.keys() == shapes.keys()
    for module, value in converted.items():
        np.testing.assert_array_equal(change(found[module]), value, module)


def state_of(shapes, names, pattern, keep):
    """(tensors of a LoRA file by original names, alpha by name)."""
    tensors, alphas = {}, {}
    for number, (layer, rows) in enumerate(originals(shapes, names)):
        if keep(layer):
            factors, alphas[layer] = factors_of(layer, rows), float(1 + number % 3)
            for word, value in (("down", factors.a), ("up", factors.b)):
                tensors[pattern(layer, word)] = torch.from_numpy(value)
    return tensors, alphas


def assert_same_changes(found, state):
    """`found` by layer; `state` as diffusers gives it to the transformer."""
    theirs = {key.removeprefix("transformer."): value for key, value in state.items()}
    modules = {key.partition(".lora_")[0] for key in theirs}
    assert found.keys() == modules and modules
    for module in modules:
        a, b = (theirs[f"{module}.lora_{x}.weight"].numpy() for x in "AB")
        np.testing.assert_allclose(change(found[module]), b @ a, 1e-5, 1e-6, module)


def test_kohya_s_names_of_flux():
    """Oracle: diffusers' converter of kohya's files; other alphas for other layers.

    It leaves the alpha of final_layer out: there it is the rank here.
    """
    shapes, names = of_flux("flux.1-dev")

    def name_of(layer, word):
        return f"lora_unet_{layer.replace('.', '_')}.lora_{word}.weight"

    tensors, alphas = state_of(shapes, names, name_of, lambda x: "processor" not in x)
    alphas |= {layer: float(RANK) for layer in alphas if "final_layer" in layer}
    found = {}
    for layer, alpha in alphas.items():
        a, b = (tensors[name_of(layer, word)].numpy() for word in ("down", "up"))
        joined = name_of(layer, "down").partition(".")[0]
        tensors[f"{joined}.alpha"] = torch.tensor(alpha)
        whole = Factors(a, b, alpha / RANK)
        found |= LayerNames(shapes, names).split(joined, whole, "x")
    convert = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers
    assert_same_changes(found, convert(tensors))
    assert found.keys() == shapes.keys()


def test_xlabs_names_of_flux():
    """Oracle: diffusers' converter of XLabs's files, which know no alpha."""
    shapes, names = of_flux("flux.1-dev")

    def name_of(layer, word):
        return f"{layer}.{word}.weight"

    tensors, alphas = state_of(shapes, names, name_of, lambda x: "processor" in x)
    found = {}
    for layer in alphas:
        a, b = (tensors[name_of(layer, word)].numpy() for word in ("down", "up"))
        found |= LayerNames(shapes, names).split(layer, Factors(a, b, 1.0), "x")
    convert = lora_conversion_utils._convert_xlabs_flux_lora_to_diffusers
    assert_same_changes(found, convert(tensors))


@pytest.mark.parametrize(
    "of, name", [(of_flux, "flux.1-dev"), (of_sd3, "sd3.5-medium")]
)
def test_no_two_layers_share_a_name(of, name):
    """Oracle: an invariance; with underscores for dots there are as many names."""
    shapes, names = of(name)
    dotted = {layer for layer, _ in originals(shapes, names)} | shapes.keys()
    assert len({layer.replace(".", "_") for layer in dotted}) == len(dotted)
