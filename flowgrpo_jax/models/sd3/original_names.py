"""SD3's names in the files of Stability AI and of ComfyUI.

As in diffusers' `convert_sd3_transformer_checkpoint_to_diffusers`.
"""

from flowgrpo_jax.models.files.tensors import Rule
from flowgrpo_jax.models.layer_names import Layers, layer_rules, norm_rules
from flowgrpo_jax.models.sd3.transformer_config import MMDiTConfig, groups

# Our layer to theirs; of a block, and around the blocks. Query, key and value are one
# layer there as well.
BLOCK_LAYERS: Layers = {
    "norm1": "x_block.adaLN_modulation.1",
    "norm1_context": "context_block.adaLN_modulation.1",
    "attn/qkv": "x_block.attn.qkv",
    "attn/add_qkv": "context_block.attn.qkv",
    "attn/to_out": "x_block.attn.proj",
    "attn/to_add_out": "context_block.attn.proj",
    "attn2/qkv": "x_block.attn2.qkv",
    "attn2/to_out": "x_block.attn2.proj",
    "ff/proj": "x_block.mlp.fc1",
    "ff/out": "x_block.mlp.fc2",
    "ff_context/proj": "context_block.mlp.fc1",
    "ff_context/out": "context_block.mlp.fc2",
}
BLOCK_NORMS = {
    "attn/norm_q": "x_block.attn.ln_q",
    "attn/norm_k": "x_block.attn.ln_k",
    "attn/add_norm_q": "context_block.attn.ln_q",
    "attn/add_norm_k": "context_block.attn.ln_k",
    "attn2/norm_q": "x_block.attn2.ln_q",
    "attn2/norm_k": "x_block.attn2.ln_k",
}
OUTER_LAYERS: Layers = {
    "time_text_embed/timestep_1": "t_embedder.mlp.0",
    "time_text_embed/timestep_2": "t_embedder.mlp.2",
    "time_text_embed/text_1": "y_embedder.mlp.0",
    "time_text_embed/text_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
}
# Shift comes before scale there.
SWAPPED: Layers = {
    "norm_out": "final_layer.adaLN_modulation.1",
    "last_block/norm1_context": "joint_blocks.{last}.context_block.adaLN_modulation.1",
}


def table(config: MMDiTConfig) -> list[Rule]:
    """Rename table to these files; see `transformer_config.table`."""
    last = config.num_layers - 1
    swapped = {
        ours: tuple(f"{theirs}[{half}/2]".format(last=last) for half in ("1:2", "0:1"))
        for ours, theirs in SWAPPED.items()
    }
    rules = [
        Rule(
            "pos_embed/proj/kernel",
            "x_embedder.proj.weight",
            "patch",
            patch=config.patch_size,
        ),
        Rule("pos_embed/proj/bias", "x_embedder.proj.bias"),
        Rule("pos_embed/table", "pos_embed", "grid", grid=config.pos_embed_max_size),
    ]
    rules += layer_rules(swapped | OUTER_LAYERS, "", "")
    stacks = [
        (f"{group.name}/block/", "joint_blocks.{layer}.", group.first)
        for group in groups(config)
    ]
    for ours, theirs, first in (*stacks, ("last_block/", f"joint_blocks.{last}.", 0)):
        rules += layer_rules(BLOCK_LAYERS, ours, theirs, first)
        rules += norm_rules(BLOCK_NORMS, ours, theirs, first)
    return rules
