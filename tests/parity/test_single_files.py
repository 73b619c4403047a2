"""Transformers in one file: read as diffusers converts them, fp8 too."""

import dataclasses
import functools
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax.config import families
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.spec import ModelSpec
from tests.parity import original_layouts, tiny_flux, tiny_sd3

KINDS = ("sd3-medium", "sd3.5-medium", "dev", "schnell")
PREFIX = "model.diffusion_model."
FP8 = torch.float8_e4m3fn


class Case:
    """A folder, another transformer of its kind, and that one under its makers' names."""

    def __init__(self, folder, kind):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            if kind in tiny_flux.KINDS:
                tiny_flux.write_pipeline(folder, kind=kind)
                other = tiny_flux.transformer(**tiny_flux.KINDS[kind][0])
            else:
                tiny_sd3.write_pipeline(folder, kind=kind)
                other = tiny_sd3.transformer(kind)
            self.network = tiny_sd3.randomize(other)
        self.folder, self.kind = folder, kind
        self.file = self.renamed()
        self.code = families.of(str(folder)).code
        spec = ModelSpec(str(folder), resolution=64, max_sequence_length=24)
        self.model = self.code.plan(spec, folder)
        self.like = self.code.shapes(self.model, jnp.float32)

    def renamed(self, **options):
        held, given = self.network.config, self.network.state_dict()
        if isinstance(self.network, SD3Transformer2DModel):
            return original_layouts.sd3(given, held.num_layers)
        blocks = held.num_layers, held.num_single_layers
        return original_layouts.flux(given, *blocks, **options)

    def converted(self, given):
        """The file's tensors as diffusers converts them."""
        kind = "flux" if isinstance(self.network, FluxTransformer2DModel) else "sd3"
        name = f"convert_{kind}_transformer_checkpoint_to_diffusers"
        code, names = inspect.getsource(getattr(single_file_utils, name)), {}
        if kind == "flux":  # the width of the released models is written into it
            assert code.count("inner_dim = 3072\n") == 1
            width = self.network.inner_dim
            code = code.replace("inner_dim = 3072\n", f"inner_dim = {width}\n")
        exec(code, names | vars(single_file_utils), names)
        return names[name](dict(given))

    def with_transformer(self, path):
        return dataclasses.replace(self.model, transformer_path=str(path))

    def read(self, path):
        """What we make of a file, or of a folder of diffusers."""
        model, transformer = self.with_transformer(path), self.like["transformer"]
        source = self.code.source(self.folder, model, self.like)
        if "buffers" not in self.like:
            return {"transformer": source.read(transformer)}
        buffers = self.like["buffers"]
        return {
            "transformer": source.read(transformer, buffers),
            "buffers": source.read(buffers, alone=False),
        }

    @functools.cached_property
    def expected(self):
        """The other transformer as we read it from diffusers' own folder."""
        return self.read(self.saved(self.folder / "other"))

    def saved(self, folder, tensors=None):
        """The transformer with these tensors as diffusers saves it."""
        network = type(self.network).from_config(self.network.config)
        network.load_state_dict(tensors or self.network.state_dict())
        network.save_pretrained(folder)
        return folder


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp("model"), request.param)


def save(path, tensors, prefix="", **beside):
    named = {f"{prefix}{name}": tensors[name].contiguous() for name in tensors}
    save_file(named | beside, path)
    return path


def same(first, second):
    return jax.tree.all(jax.tree.map(np.array_equal, first, second))


def test_the_layout_is_the_one_that_diffusers_converts(case):
    """Oracle: diffusers' converter gives back the network's own tensors, all of them."""
    found = case.converted({f"{PREFIX}{name}": case.file[name] for name in case.file})
    wanted = case.network.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_file_is_read_as_a_folder_of_diffusers(case, tmp_path, prefix):
    """Oracle: the same network saved by diffusers, bit for bit."""
    path = save(tmp_path / "one.safetensors", case.file, prefix)
    assert same(case.read(path), case.expected)


@pytest.mark.parametrize("case", ["dev"], indirect=True)
def test_norms_as_comfyui_saves_them(case, tmp_path):
    """Oracle: as above."""
    renamed = save(tmp_path / "comfy.safetensors", case.renamed(norm="weight"))
    assert same(case.read(renamed), case.expected)


@pytest.mark.parametrize("case", ["sd3.5-medium", "dev"], indirect=True)
def test_scaled_fp8(case, tmp_path):
    """Oracle: torch's products in fp32 of what the file holds, converted by diffusers."""
    factor, of_inputs = {
        "dev": ("scale_weight", "scale_input"),
        "sd3.5-medium": ("weight_scale", "input_scale"),
    }[case.kind]
    stored, plain = {"scaled_fp8": torch.zeros(2, dtype=FP8)}, {}
    for number, (name, tensor) in enumerate(case.file.items()):
        stored[name] = plain[name] = tensor.contiguous()
        if tensor.ndim != 2:
            continue
        layer, scale = name.removesuffix(".weight"), tensor.abs().max() / 448
        stored[name] = (tensor / scale).to(FP8)
        stored[f"{layer}.{factor}"] = scale if number % 2 else scale[None]
        stored[f"{layer}.{of_inputs}"] = torch.ones(())
        plain[name] = stored[name].float() * scale
    path = save(tmp_path / "fp8.safetensors", stored, PREFIX)
    wanted = case.saved(tmp_path / "transformer", case.converted(plain))
    assert same(case.read(path), case.read(wanted))


@pytest.mark.parametrize("case", ["dev"], indirect=True)
def test_a_run_takes_it_by_its_key(case, tmp_path, capsys):
    """Oracle: the folder that diffusers saved; what else the file holds is told."""
    config = configs.make(f"model={case.folder}")
    config.dtype, config.resolution, config.max_sequence_length = "float32", 64, 24
    _, own = assemble.load_model(config)
    assert not capsys.readouterr().err
    path = tmp_path / "one.safetensors"
    with pytest.raises(
        UserError, match="give it as transformer_path, and as model a di"
    ):
        assemble.load_model(configs.make(f"model={save(path, case.file)}"))
    with pytest.raises(
        UserError, match=f"^transformer_path: {path}: the embedded model"
    ):
        assemble.load_model(configs.make(f"transformer_path={path}"))
    beside = {"vae.decoder.bias": torch.zeros(2), "text_encoders.b": torch.zeros(2)}
    config.transformer_path = str(save(path, case.file, PREFIX, **beside))
    _, found = assemble.load_model(config)
    assert same({"transformer": found["transformer"]}, case.expected)
    assert not same(found["transformer"], own["transformer"])
    assert same(found["vae"], own["vae"])
    line = f"transformer_path: {path}: text_encoders, vae: not read: autoencoder and"
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize("case", ["sd3.5-medium"], indirect=True)
def test_its_positions_are_exported(case, tmp_path):
    """Oracle: the tensors of the network whose file it is; also those not learned."""
    path = save(tmp_path / "one.safetensors", case.file, PREFIX)
    variables = case.read(path)
    case.code.write_transformer(
        tmp_path / "out", variables, case.with_transformer(path)
    )
    found = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    wanted = case.network.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("case", ["sd3.5-medium", "dev"], indirect=True)
def test_what_does_not_fit_is_named(case, tmp_path):
    """Oracle: the lines, by hand."""
    name = next(name for name in case.file if ".qkv.weight" in name)
    path = tmp_path / "one.safetensors"
    for changed, line in (
        ({}, f"tensor {PREFIX}{name}: missing"),
        ({name: case.file[name][:-1]}, f"tensor {PREFIX}{name}: shape "),
        ({name: case.file[name].to(torch.int8)}, f"tensor {PREFIX}{name}: whole num"),
        (
            {name: case.file[name], "more": torch.zeros(1)},
            f"tensor {PREFIX}more: nothing in the network takes it",
        ),
    ):
        others = {key: case.file[key] for key in case.file if key != name}
        save(path, others | changed, PREFIX)
        with pytest.raises(UserError) as caught:
            case.read(path)
        assert str(caught.value).startswith(f"weights: {path}: {line}")
    with pytest.raises(UserError, match="^transformer_path: .*: no such file or fold"):
        case.read(tmp_path / "gone.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    (tmp_path / "hidden.safetensors").write_bytes(b"GGUF" + bytes(100))
    for path in (tmp_path / "model.gguf", tmp_path / "hidden.safetensors"):
        with pytest.raises(UserError, match="a gguf file.*from_single_file.*dequanti"):
            case.read(path)


@pytest.mark.parametrize("case", ["sd3.5-medium", "dev"], indirect=True)
def test_a_folder_that_was_quantised_once(case, tmp_path):
    """Oracle: the folder without the key that diffusers leaves when it dequantises."""
    folder = case.saved(tmp_path / "transformer")
    path = folder / "config.json"
    held = json.loads(path.read_text())
    path.write_text(json.dumps(held | {"quantization_config": {"load_in_4bit": True}}))
    spec = ModelSpec(
        str(case.folder), "", str(folder), resolution=64, max_sequence_length=24
    )
    model = case.code.plan(spec, case.folder)
    assert model.denoiser == case.model.denoiser
    path.write_text(json.dumps(held | {"num_layers": 3}))
    assert case.code.plan(spec, case.folder).denoiser.config.num_layers == 3
