"""The layers of FLUX.1 as Black Forest Labs named them, and XLabs their LoRA."""

from flowgrpo_jax.models.files.original_names import OriginalNames, block_names

_QUERY_KEY_VALUE = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_DOUBLE: dict[str, str | tuple[str, ...]] = {
    "img_mod.lin": "norm1.linear",
    "img_attn.qkv": _QUERY_KEY_VALUE,
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mod.lin": "norm1_context.linear",
    "txt_attn.qkv": _ADDED,
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    # XLabs's, before ".down.weight" and ".up.weight".
    "processor.qkv_lora1": _QUERY_KEY_VALUE,
    "processor.proj_lora1": "attn.to_out.0",
    "processor.qkv_lora2": _ADDED,
    "processor.proj_lora2": "attn.to_add_out",
}
_SINGLE: dict[str, str | tuple[str, ...]] = {
    "modulation.lin": "norm.linear",
    "linear1": (*_QUERY_KEY_VALUE, "proj_mlp"),
    "linear2": "proj_out",
    "processor.qkv_lora": _QUERY_KEY_VALUE,
    "processor.proj_lora": "proj_out",
}
_OUTER: dict[str, str | tuple[str, ...]] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}

# The scales of norms; ComfyUI calls them weights in the files that it saves.
_SCALES = ("scale", "weight")
_DOUBLE_NORMS = {
    f"{stream}_attn.norm.{norm}_norm.{scale}": f"attn.{theirs}_{norm[0]}.weight"
    for stream, theirs in (("img", "norm"), ("txt", "norm_added"))
    for norm in ("query", "key")
    for scale in _SCALES
}
_SINGLE_NORMS = {
    f"norm.{norm}_norm.{scale}": f"attn.norm_{norm[0]}.weight"
    for norm in ("query", "key")
    for scale in _SCALES
}

NAMES = OriginalNames(
    block_names("double_blocks.{layer}.", "transformer_blocks.{layer}.", _DOUBLE)
    | block_names(
        "single_blocks.{layer}.", "single_transformer_blocks.{layer}.", _SINGLE
    )
    | block_names("", "", _OUTER),
    # Shift before scale there, scale before shift in diffusers.
    swapped=frozenset({"norm_out.linear"}),
    tensors=block_names(
        "double_blocks.{layer}.", "transformer_blocks.{layer}.", _DOUBLE_NORMS
    )
    | block_names(
        "single_blocks.{layer}.", "single_transformer_blocks.{layer}.", _SINGLE_NORMS
    ),
)
