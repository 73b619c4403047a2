#!/usr/bin/env bash
# diffusers 0.42.1: one LoRA of strength 2 (rank 4, alpha 8) in the layouts that people
# have, through load_lora_weights. Only the file with a JSON header is read at strength 2
# by both pipelines. Kohya's names are nothing to SD3's pipeline, without an error; FLUX's
# takes the blocks from them and drops the layers around those, without an error.
# Matters for: whoever shares a LoRA, or goes on from one. Guessed: alpha / rank, or an
# error. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.13.0" "diffusers==0.42.1" "peft==0.21.2" \
    "transformers==5.24.0" "numpy==2.4.6"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work" 2>/dev/null <<'PY'
import json
import sys
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import save_file

RANK, ALPHA = 4, 8.0
SIZES = dict(num_layers=2, attention_head_dim=16, num_attention_heads=2)
SIZES |= dict(joint_attention_dim=12, pooled_projection_dim=10)


def flux():
    network = FluxTransformer2DModel(
        in_channels=16, num_single_layers=1, axes_dims_rope=(4, 6, 6), **SIZES
    )
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2")
    parts = dict.fromkeys((*names, "tokenizer_2"))
    return FluxPipeline(transformer=network, **parts)


def sd3():
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, caption_projection_dim=32,
        pos_embed_max_size=8, **SIZES,
    )
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2")
    names += ("tokenizer_2", "text_encoder_3", "tokenizer_3")
    return StableDiffusion3Pipeline(transformer=network, **dict.fromkeys(names))


def factors(pipeline, module):
    layer = pipeline.transformer.get_submodule(module)
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(RANK, layer.in_features, generator=draw)
    return a, torch.randn(layer.out_features, RANK, generator=draw)


def strength(pipeline, module, tensors, header=None):
    """What the pipeline multiplies B A with, or what it says instead."""
    a, b = factors(pipeline, module)
    path = Path(sys.argv[1]) / "lora.safetensors"
    save_file(tensors, path, header)
    try:
        pipeline.load_lora_weights(str(path))
    except Exception as error:
        return type(error).__name__
    layer = pipeline.transformer.get_submodule(module)
    if not getattr(layer, "lora_A", None):
        return "nothing, no error"
    change = layer.get_delta_weight(next(iter(layer.lora_A)))
    return f"{float((change * (b @ a)).sum() / ((b @ a) ** 2).sum()):g}"


def layouts(make, module, original):
    a, b = factors(make(), module)
    alpha = torch.tensor(ALPHA)
    told = {"r": RANK, "lora_alpha": ALPHA, "target_modules": [module]}
    told = json.dumps({f"transformer.{key}": told[key] for key in told})
    joined = original.replace(".", "_")
    diffusers = {
        f"transformer.{module}.lora_A.weight": a,
        f"transformer.{module}.lora_B.weight": b,
    }
    yield "header", diffusers, {"lora_adapter_metadata": told}
    yield "A, B, .alpha", diffusers | {f"transformer.{module}.alpha": alpha}, None
    yield "down, up, .alpha", {
        f"transformer.{module}.lora_down.weight": a,
        f"transformer.{module}.lora_up.weight": b,
        f"transformer.{module}.alpha": alpha,
    }, None
    yield "kohya", {
        f"lora_unet_{joined}.lora_down.weight": a,
        f"lora_unet_{joined}.lora_up.weight": b,
        f"lora_unet_{joined}.alpha": alpha,
    }, None
    yield "ComfyUI, .alpha", {
        f"diffusion_model.{original}.lora_A.weight": a,
        f"diffusion_model.{original}.lora_B.weight": b,
        f"diffusion_model.{original}.alpha": alpha,
    }, None


CASES = {
    "SD3 attention": (
        sd3, "transformer_blocks.0.attn.to_out.0", "joint_blocks.0.x_block.attn.proj",
    ),
    "FLUX attention": (
        flux, "transformer_blocks.0.attn.to_out.0", "double_blocks.0.img_attn.proj",
    ),
    "FLUX last layer": (flux, "proj_out", "final_layer.linear"),
}
found = {}
for name, (make, module, original) in CASES.items():
    for layout, tensors, header in layouts(make, module, original):
        found[name, layout] = strength(make(), module, tensors, header)
        print(f"{name:16} {layout:18} {found[name, layout]}")
assert {found[name, "header"] for name in CASES} == {"2"}
nothing = "nothing, no error"
assert found["SD3 attention", "kohya"] == nothing
assert found["FLUX attention", "kohya"] == "2"
assert found["FLUX attention", "down, up, .alpha"] == "1"
assert found["FLUX attention", "A, B, .alpha"] == "2"
assert found["FLUX last layer", "kohya"] == nothing
PY
