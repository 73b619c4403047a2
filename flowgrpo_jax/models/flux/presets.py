"""What the released models say in their config.json: plans need no download.

Source: the `transformer/config.json` of the diffusers folders named in `HUB_IDS`.
"""

from typing import Any

HUB_IDS = {
    "flux.1-dev": "black-forest-labs/FLUX.1-dev",
    "flux.1-schnell": "black-forest-labs/FLUX.1-schnell",
}

_FLUX: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
}

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "flux.1-dev": _FLUX | {"guidance_embeds": True},
    "flux.1-schnell": _FLUX,
}

_SCHEDULER: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
# Their scheduler/scheduler_config.json.
SCHEDULERS: dict[str, dict[str, Any]] = {
    "flux.1-dev": _SCHEDULER | {"shift": 3.0, "use_dynamic_shifting": True},
    "flux.1-schnell": _SCHEDULER | {"shift": 1.0},
}
