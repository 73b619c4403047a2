"""Which axis of a parameter is split over the devices of `fsdp`, by its path."""

from flowgrpo_jax.runtime import mesh as meshes

# Kernels are sharded along their input or output features (`fsdp`), the rest is small.
SHARDING_RULES: meshes.Rules = (
    (
        r"(qkv|proj|proj_mlp|x_embedder|context_embedder|norm|norm1|norm1_context"
        r"|norm_out)/kernel",
        (None, "fsdp"),
    ),
    (r"(out|to_out|to_add_out|proj_out)/kernel", ("fsdp", None)),
)
