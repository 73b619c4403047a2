"""FLUX.1's names in the files of Black Forest Labs and of ComfyUI.

As in diffusers' `convert_flux_transformer_checkpoint_to_diffusers`.
"""

from flowgrpo_jax.models.files.tensors import Rule, Table
from flowgrpo_jax.models.layer_names import Layers, layer_rules, norm_rules

# Our layer to theirs; of a block of each kind, and around the blocks. Query, key and
# value are one layer there as well.
DOUBLE_LAYERS: Layers = {
    "norm1": "img_mod.lin",
    "norm1_context": "txt_mod.lin",
    "attn/qkv": "img_attn.qkv",
    "attn/add_qkv": "txt_attn.qkv",
    "attn/to_out": "img_attn.proj",
    "attn/to_add_out": "txt_attn.proj",
    "ff/proj": "img_mlp.0",
    "ff/out": "img_mlp.2",
    "ff_context/proj": "txt_mlp.0",
    "ff_context/out": "txt_mlp.2",
}
DOUBLE_NORMS = {
    "attn/norm_q": "img_attn.norm.query_norm",
    "attn/norm_k": "img_attn.norm.key_norm",
    "attn/add_norm_q": "txt_attn.norm.query_norm",
    "attn/add_norm_k": "txt_attn.norm.key_norm",
}
# Three widths of query, key and value, then the four of the MLP, are one layer there.
SINGLE_LAYERS: Layers = {
    "norm": "modulation.lin",
    "attn/qkv": "linear1[0:3/7]",
    "proj_mlp": "linear1[3:7/7]",
    "proj_out": "linear2",
}
SINGLE_NORMS = {"attn/norm_q": "norm.query_norm", "attn/norm_k": "norm.key_norm"}
OUTER_LAYERS: Layers = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed/timestep_1": "time_in.in_layer",
    "time_text_embed/timestep_2": "time_in.out_layer",
    "time_text_embed/guidance_1": "guidance_in.in_layer",
    "time_text_embed/guidance_2": "guidance_in.out_layer",
    "time_text_embed/text_1": "vector_in.in_layer",
    "time_text_embed/text_2": "vector_in.out_layer",
    # Shift comes before scale there.
    "norm_out": (
        "final_layer.adaLN_modulation.1[1:2/2]",
        "final_layer.adaLN_modulation.1[0:1/2]",
    ),
    "proj_out": "final_layer.linear",
}


def tables() -> tuple[Table, ...]:
    """Rename tables, by what the scales of norms are called.

    ComfyUI calls them "weight" in the files that it saves.
    """
    return tuple(_table(scale) for scale in ("scale", "weight"))


def _table(scale: str) -> list[Rule]:
    rules = layer_rules(OUTER_LAYERS, "", "")
    for layers, norms, kind in (
        (DOUBLE_LAYERS, DOUBLE_NORMS, "double_blocks"),
        (SINGLE_LAYERS, SINGLE_NORMS, "single_blocks"),
    ):
        inside, there = f"{kind}/block/", f"{kind}.{{layer}}."
        rules += layer_rules(layers, inside, there)
        rules += norm_rules(norms, inside, there, scale=scale)
    return rules
