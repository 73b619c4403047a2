"""The row of the embedded worlds in the table of families, without networks."""

from flowgrpo_jax.models.family import Family

ROW = Family(
    name="embedded",
    module="flowgrpo_jax.worlds.family",
    # Nothing is downloaded, since their weights are in this package.
    aliases={"sprites": "", "words": ""},
    suffixes=(".safetensors",),
    embedded=True,
)
