"""Transformers of diffusers under the names of those who made the models.

Written out by hand, the other way round than diffusers' own converters, which tests let
read what is made here.
"""

import torch

Tensors = dict[str, torch.Tensor]


class _Renamed:
    """Tensors under other names, moved or joined, weight and bias together."""

    def __init__(self, given: Tensors):
        self._given, self.made = given, Tensors()

    def has(self, theirs: str) -> bool:
        return f"{theirs}.weight" in self._given

    def move(self, ours: str, theirs: str, weight: str = "weight") -> None:
        for kind, name in (("weight", weight), ("bias", "bias")):
            if f"{theirs}.{kind}" in self._given:
                self.made[f"{ours}.{name}"] = self._given[f"{theirs}.{kind}"]

    def join(self, ours: str, *theirs: str) -> None:
        for kind in ("weight", "bias"):
            parts = [self._given[f"{name}.{kind}"] for name in theirs]
            self.made[f"{ours}.{kind}"] = torch.cat(parts)

    def swap(self, ours: str, theirs: str) -> None:
        """Scale and shift, as diffusers has them, to shift and scale."""
        for kind in ("weight", "bias"):
            scale, shift = self._given[f"{theirs}.{kind}"].chunk(2)
            self.made[f"{ours}.{kind}"] = torch.cat([shift, scale])


def sd3(given: Tensors, layers: int) -> Tensors:
    """As in Stability AI's files, without a prefix."""
    file = _Renamed(given)
    file.made["pos_embed"] = given["pos_embed.pos_embed"]
    file.move("x_embedder.proj", "pos_embed.proj")
    file.move("context_embedder", "context_embedder")
    for ours, theirs in (("t", "timestep"), ("y", "text")):
        embedder = f"time_text_embed.{theirs}_embedder"
        file.move(f"{ours}_embedder.mlp.0", f"{embedder}.linear_1")
        file.move(f"{ours}_embedder.mlp.2", f"{embedder}.linear_2")
    for layer in range(layers):
        there = f"transformer_blocks.{layer}."
        image, text = (
            f"joint_blocks.{layer}.{kind}_block." for kind in ("x", "context")
        )
        file.join(f"{image}attn.qkv", *(f"{there}attn.to_{part}" for part in "qkv"))
        file.join(
            f"{text}attn.qkv", *(f"{there}attn.add_{part}_proj" for part in "qkv")
        )
        for part in "qk":
            file.move(f"{image}attn.ln_{part}", f"{there}attn.norm_{part}")
            file.move(f"{text}attn.ln_{part}", f"{there}attn.norm_added_{part}")
            file.move(f"{image}attn2.ln_{part}", f"{there}attn2.norm_{part}")
        file.move(f"{image}attn.proj", f"{there}attn.to_out.0")
        file.move(f"{text}attn.proj", f"{there}attn.to_add_out")
        if file.has(f"{there}attn2.to_q"):
            dual = (f"{there}attn2.to_{part}" for part in "qkv")
            file.join(f"{image}attn2.qkv", *dual)
            file.move(f"{image}attn2.proj", f"{there}attn2.to_out.0")
        file.move(f"{image}adaLN_modulation.1", f"{there}norm1.linear")
        last = layer == layers - 1
        (file.swap if last else file.move)(
            f"{text}adaLN_modulation.1", f"{there}norm1_context.linear"
        )
        for ours, theirs in ((image, "ff"), (text, "ff_context")):
            file.move(f"{ours}mlp.fc1", f"{there}{theirs}.net.0.proj")
            file.move(f"{ours}mlp.fc2", f"{there}{theirs}.net.2")
    file.swap("final_layer.adaLN_modulation.1", "norm_out.linear")
    file.move("final_layer.linear", "proj_out")
    return file.made


def flux(
    given: Tensors, layers: int, single_layers: int, norm: str = "scale"
) -> Tensors:
    """As in Black Forest Labs' files; `norm` is what the scale of a norm is called."""
    file = _Renamed(given)
    file.move("img_in", "x_embedder")
    file.move("txt_in", "context_embedder")
    for ours, theirs in (
        ("time", "timestep"),
        ("vector", "text"),
        ("guidance", "guidance"),
    ):
        embedder = f"time_text_embed.{theirs}_embedder"
        file.move(f"{ours}_in.in_layer", f"{embedder}.linear_1")
        file.move(f"{ours}_in.out_layer", f"{embedder}.linear_2")
    norms = (("q", "query_norm"), ("k", "key_norm"))
    for layer in range(layers):
        there = f"transformer_blocks.{layer}."
        image, text = (f"double_blocks.{layer}.{kind}_" for kind in ("img", "txt"))
        file.move(f"{image}mod.lin", f"{there}norm1.linear")
        file.move(f"{text}mod.lin", f"{there}norm1_context.linear")
        file.join(f"{image}attn.qkv", *(f"{there}attn.to_{part}" for part in "qkv"))
        file.join(
            f"{text}attn.qkv", *(f"{there}attn.add_{part}_proj" for part in "qkv")
        )
        for part, name in norms:
            file.move(f"{image}attn.norm.{name}", f"{there}attn.norm_{part}", norm)
            file.move(f"{text}attn.norm.{name}", f"{there}attn.norm_added_{part}", norm)
        file.move(f"{image}attn.proj", f"{there}attn.to_out.0")
        file.move(f"{text}attn.proj", f"{there}attn.to_add_out")
        for ours, theirs in ((image, "ff"), (text, "ff_context")):
            file.move(f"{ours}mlp.0", f"{there}{theirs}.net.0.proj")
            file.move(f"{ours}mlp.2", f"{there}{theirs}.net.2")
    for layer in range(single_layers):
        ours, there = f"single_blocks.{layer}.", f"single_transformer_blocks.{layer}."
        file.move(f"{ours}modulation.lin", f"{there}norm.linear")
        parts = [f"{there}attn.to_{part}" for part in "qkv"]
        file.join(f"{ours}linear1", *parts, f"{there}proj_mlp")
        for part, name in norms:
            file.move(f"{ours}norm.{name}", f"{there}attn.norm_{part}", norm)
        file.move(f"{ours}linear2", f"{there}proj_out")
    file.swap("final_layer.adaLN_modulation.1", "norm_out.linear")
    file.move("final_layer.linear", "proj_out")
    return file.made
