"""LoRA in and out in every layout, for every family, against diffusers and PEFT."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax.config import families
from flowgrpo_jax.models.files import lora_files, lora_reading
from flowgrpo_jax.models.files.lora_names import LayerNames
from flowgrpo_jax.models.text import TextEmbedding
from tests.parity import lora_layouts, test_flux, test_mmdit, tiny_flux, tiny_sd3
from tests.parity.oracle import assert_close

# A run whose rank and alpha are those of none of the files.
RUN_RANK, RUN_ALPHA = 7, 5.0
SIZE, TOKENS, GUIDANCE = (8, 8, 16), 5, 3.5


class Case(NamedTuple):
    """A family: diffusers' pipeline and our model of the same folder."""

    pipeline: Any
    code: Any
    model: Any
    fresh: Any  # the `lora` tree of a run that begins with nothing
    names: LayerNames
    theirs: Any  # of a transformer
    ours: Any  # of a `lora` tree


def of_flux(folder):
    pipeline = tiny_flux.write_pipeline(folder)
    scales = np.full(2, GUIDANCE, np.float32)
    return pipeline, lambda net, *given: test_flux.run_theirs(net, *given, scales)


def of_sd3(folder):
    return tiny_sd3.write_pipeline(folder), test_mmdit.run_theirs


@pytest.fixture(scope="module", params=[of_flux, of_sd3])
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    pipeline, run = request.param(folder)
    config = configs.make(f"model={folder}", resolution=64, dtype="float32")
    config.train.lora_targets, config.train.use_lora = (".*",), True
    config.train.lora_rank, config.train.lora_alpha = RUN_RANK, RUN_ALPHA
    model, variables = assemble.load_model(config)
    rng = np.random.default_rng(0)
    context, pooled = model.denoiser.text_features
    latents = rng.standard_normal((2, *SIZE)).astype(np.float32)
    sigma = np.array([0.9, 0.3], np.float32)
    text = [
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((2, TOKENS, context), (2, pooled))
    ]
    embedded = model.denoiser.guidance == "embedded"
    velocity = jax.jit(model.velocity, static_argnames="guidance")

    @torch.no_grad()
    def theirs(transformer):
        return run(transformer, torch.from_numpy(latents), sigma, *text).numpy()

    def ours(lora):
        return velocity(
            variables | {"lora": lora},
            jnp.asarray(latents),
            jnp.asarray(sigma),
            TextEmbedding(*map(jnp.asarray, text)),
            guidance=GUIDANCE if embedded else None,
        )

    code = families.of(config.model).code
    fresh = assemble.trainable_part(config, model, variables)["lora"]
    return Case(pipeline, code, model, fresh, code.layer_names(model), theirs, ours)


@pytest.fixture(scope="module")
def base(case):
    """What the network answers without an adapter."""
    return case.theirs(case.pipeline.transformer)


@pytest.fixture(scope="module", params=[0.5, 1.0, 2.0])
def wanted(request, case, base):
    """(source, what PEFT makes of it); an effect of some size."""
    source = lora_layouts.source(
        case.pipeline, case.code.original_names(case.model), request.param
    )
    answer = case.theirs(lora_layouts.adapted(source))
    case.pipeline.unload_lora_weights()
    assert np.abs(answer - base).max() > 0.1 * np.abs(base).max()
    assert_close(case.theirs(case.pipeline.transformer), base)  # it is out again
    return source, answer


def started(case, path):
    """What a run begins with; `with_adapter`, but for names that are made once."""
    layers = lora_reading.read(path, case.names)
    table, alpha = case.code.table(case.model), case.model.denoiser.lora_alpha
    return lora_files.to_variables(layers, case.fresh, table, alpha)


@pytest.mark.parametrize("layout", lora_layouts.LAYOUTS)
def test_a_layout(case, wanted, layout, tmp_path):
    """Oracle: PEFT, which holds the same adapter in diffusers' transformer."""
    source, answer = wanted
    path = lora_layouts.LAYOUTS[layout](tmp_path, source)
    assert_close(case.ours(started(case, path)), answer)


# What diffusers 0.42 reads at the right strength; see docs/lora.md for the others.
READ = {
    "FluxPipeline": ("diffusers' pipeline", "diffusers' names and alphas", "kohya"),
    "StableDiffusion3Pipeline": ("diffusers' pipeline",),
}


@pytest.mark.parametrize("wanted", [2.0], indirect=True)
@pytest.mark.parametrize("layout", READ["FluxPipeline"])
def test_a_layout_as_diffusers_reads_it(case, wanted, layout, tmp_path):
    """Oracle: load_lora_weights: a file of the test is what people have."""
    if layout not in READ[type(case.pipeline).__name__]:
        pytest.skip("not read by this pipeline, or at another strength")
    source, _ = wanted
    # Of kohya's it drops what is around the blocks, and splits linear1 for the released
    # width only.
    left = {
        name: modules
        for name, modules in source.fused.items()
        if layout != "kohya" or ("blocks." in name and "linear1" not in name)
    }
    layers = {name: source.layers[name] for parts in left.values() for name in parts}
    path = lora_layouts.LAYOUTS[layout](
        tmp_path, source._replace(fused=left, layers=layers)
    )
    case.pipeline.load_lora_weights(path)
    answer = case.theirs(case.pipeline.transformer)
    case.pipeline.unload_lora_weights()
    assert_close(case.ours(started(case, path)), answer)


def test_a_run_begins_with_it(case, tmp_path):
    """Oracle: an invariance; by `train.lora_path`, as by the names made beforehand."""
    names = case.code.original_names(case.model)
    path = lora_layouts.kohya(tmp_path, lora_layouts.source(case.pipeline, names, 1.0))
    found = case.code.with_adapter(str(path), case.fresh, case.model)
    jax.tree.map(np.testing.assert_array_equal, found, started(case, path))


def random_lora(case):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32),
        case.fresh,
    )


@pytest.mark.parametrize("reader", ["header", "no header", "PEFT"])
def test_what_is_written(case, base, reader, tmp_path):
    """Oracle: diffusers, also as one who knows no header; and PeftModel."""
    lora = random_lora(case)
    adapter = case.code.adapter({"lora": lora}, case.model)
    path = lora_files.write_diffusers(tmp_path, adapter)
    if reader == "no header":
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
        save_file(weights, path, {"format": "pt"})
    if reader == "PEFT":
        folder = lora_files.write_peft(tmp_path / "peft", adapter, "")
        model = PeftModel.from_pretrained(case.pipeline.transformer, folder)
        answer = case.theirs(model)
        model.unload()
    else:
        case.pipeline.load_lora_weights(tmp_path)
        answer = case.theirs(case.pipeline.transformer)
        case.pipeline.unload_lora_weights()
    assert np.abs(answer - base).max() > 0.1 * np.abs(base).max()
    assert_close(case.ours(lora), answer)
