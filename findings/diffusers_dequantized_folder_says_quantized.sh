#!/usr/bin/env bash
# diffusers 0.42.1: a transformer that was loaded from bitsandbytes weights, dequantised and
# saved has plain bf16 tensors, and a config.json that still has its quantization_config.
# Guessed: dequantize() takes the key away, as it takes away the quantiser. So whoever asks
# the key refuses good weights, and diffusers itself takes the folder for a quantised one.
# Matters for: telling quantised folders from others; ask the tensors. bitsandbytes is only
# let in on a GPU; here its CPU code is used in spite of that. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "diffusers==0.42.1" "torch==2.13.0" "accelerate==1.15.0" \
  "bitsandbytes==0.50.2" "transformers==5.24.0" "safetensors==0.8.0"
cd "$work"
"$work/venv/bin/python" - <<'PY'
import json

import torch
from diffusers import AutoModel, BitsAndBytesConfig, SD3Transformer2DModel
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from safetensors import safe_open

quantizer = bnb_quantizer.BnB4BitDiffusersQuantizer
quantizer.validate_environment = lambda self, *args, **options: None
quantizer.update_device_map = lambda self, given: {"": torch.device("cpu")}
torch.cuda.current_device = lambda: torch.device("cpu")

SD3Transformer2DModel(
    sample_size=8,
    num_layers=1,
    attention_head_dim=32,
    num_attention_heads=2,
    joint_attention_dim=64,
    caption_projection_dim=64,
    pooled_projection_dim=64,
    pos_embed_max_size=12,
).save_pretrained("plain")
four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
SD3Transformer2DModel.from_pretrained(
    "plain", quantization_config=four, torch_dtype=torch.bfloat16
).save_pretrained("four")
AutoModel.from_pretrained("four", torch_dtype=torch.bfloat16).dequantize().save_pretrained("back")
for folder in ("plain", "four", "back"):
    with safe_open(f"{folder}/diffusion_pytorch_model.safetensors", "pt") as file:
        types = sorted({str(file.get_tensor(name).dtype) for name in file.keys()})
    with open(f"{folder}/config.json") as config:
        told = json.load(config).get("quantization_config", {}).get("quant_method")
    print(f"{folder}: {', '.join(types)}; quant_method {told}")
    assert ("torch.uint8" in types) == (folder == "four")
    assert (told == "bitsandbytes") == (folder != "plain")
PY
