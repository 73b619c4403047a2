"""What making images from sharded weights costs."""

import jax
import numpy as np
import pytest

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import specs
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.inference.pipeline import Pipeline
from flowgrpo_jax.runtime import mesh as meshes


@pytest.fixture
def gathered(monkeypatch):
    """Types in which whole copies of sharded parameters are made, as programs ask."""
    types = set()
    gather = jax.lax.all_gather

    def watched(leaf, *args, **options):
        types.add(leaf.dtype.name)
        return gather(leaf, *args, **options)

    monkeypatch.setattr(jax.lax, "all_gather", watched)
    return types


def test_evaluation_gathers_weights_in_the_type_of_the_layers(weights_file, gathered):
    """Oracle: as training does; fp32 copies would be twice the bytes."""
    config = configs.make(
        model=weights_file,
        dtype="bfloat16",
        microbatch=2,
        sample__eval_num_steps=1,
        sample__num_steps=1,
        eval__sde=False,
        eval__guidance_scale=1.0,
    )
    mesh = meshes.make_mesh({"data": 1, "fsdp": 2}, jax.devices()[:2])
    model, variables = assemble.load_model(config)
    variable_specs = meshes.specs(variables, model.denoiser.sharding_rules, mesh)
    prompts = [Prompt("a photo of a ring")]
    texts = [prompt.text for prompt in prompts]
    table = assemble.make_text_table(config, model, variables, texts)
    spec = specs.eval_spec(config, model)
    pipeline = Pipeline(spec.images, spec.sized, mesh, variable_specs, prompts, table)
    placed = meshes.place(variables, variable_specs, mesh)
    one = np.zeros(1, np.int32)
    assert pipeline.images(placed, one, one, "eval_").shape == (1, 24, 24, 3)
    assert gathered == {"bfloat16"}
