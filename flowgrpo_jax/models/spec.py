"""Which model a run has, and how: all that a family needs to make it."""

import dataclasses

from flowgrpo_jax.runtime.resolution import Resolution, Size


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model by name, and the options of its networks; weights are not part of it.

    `path` is where its files lie, if not where `name` says, and `transformer_path` where
    the transformer's weights do, if not there. `resolution` is that of the config, and
    `sizes` are others that the networks must be able to draw. A `lora_rank` of 0 is no
    adapter; `lora_targets` are regular expressions of the ends of diffusers' module names.
    """

    name: str
    path: str = ""
    transformer_path: str = ""
    resolution: Resolution = 0
    sizes: tuple[Size, ...] = ()
    max_sequence_length: int = 256
    dtype: str = "float32"
    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_targets: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Where its files are looked for."""
        return self.path or self.name
