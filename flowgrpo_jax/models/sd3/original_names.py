"""The layers of Stable Diffusion 3 as Stability AI named them."""

from flowgrpo_jax.models.files.original_names import OriginalNames, block_names

_BLOCK: dict[str, str | tuple[str, ...]] = {
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
_OUTER: dict[str, str | tuple[str, ...]] = {
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_NORMS = {
    f"{block}_block.{attention}.ln_{part}.weight": f"{attention}.{theirs}_{part}.weight"
    for block, attention, theirs in (
        ("x", "attn", "norm"),
        ("x", "attn2", "norm"),
        ("context", "attn", "norm_added"),
    )
    for part in "qk"
}
_TENSORS = {
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder.proj.weight": "pos_embed.proj.weight",
    "x_embedder.proj.bias": "pos_embed.proj.bias",
}


def names(num_layers: int) -> OriginalNames:
    """Of a transformer of that many blocks; the last one uses the text differently."""
    last = f"transformer_blocks.{num_layers - 1}.norm1_context.linear"
    return OriginalNames(
        block_names("joint_blocks.{layer}.", "transformer_blocks.{layer}.", _BLOCK)
        | block_names("", "", _OUTER),
        # Shift before scale there, scale before shift in diffusers.
        swapped=frozenset({"norm_out.linear", last}),
        tensors=block_names(
            "joint_blocks.{layer}.", "transformer_blocks.{layer}.", _NORMS
        )
        | block_names("", "", _TENSORS),
    )
