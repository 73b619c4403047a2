"""The transformer of FLUX.1 against diffusers' FluxTransformer2DModel, in fp32."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from flax import traverse_util
from jax.sharding import PartitionSpec
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import tensors
from flowgrpo_jax.models.flux import cost, transformer_config
from flowgrpo_jax.models.flux.presets import TRANSFORMERS
from flowgrpo_jax.models.flux.sharding import SHARDING_RULES
from flowgrpo_jax.models.flux.transformer import Flux, pack, unpack
from flowgrpo_jax.models.flux.transformer_config import FluxConfig
from flowgrpo_jax.runtime import mesh as meshes
from tests.parity.oracle import BAR, assert_close

SMALL = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 20,
    "pooled_projection_dim": 10,
    "axes_dims_rope": (4, 4, 4),
    "guidance_embeds": True,
}
CONFIGS = {
    "dev": SMALL,
    "schnell": SMALL | {"guidance_embeds": False},
    "uneven axes": SMALL
    | {
        "attention_head_dim": 16,
        "axes_dims_rope": (2, 8, 6),
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 3,
    },
}
RANK, ALPHA = 3, 5.0
# One pattern for both kinds of blocks, the MLPs too.
PATTERNS = (r"attn\.(to|add)_.*", r"ff\.net\.2", "proj_mlp", "proj_out")


def randomized(model):
    """Random values everywhere: zeros and ones of a fresh model would hide much."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
            if "norm_" in name and parameter.ndim == 1 and "linear" not in name:
                parameter.add_(1.0)
    return model.eval()


@pytest.fixture(scope="module", params=CONFIGS)
def models(request, tmp_path_factory):
    """(their model, our config, our variables) by way of a saved folder."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    theirs = randomized(FluxTransformer2DModel(**CONFIGS[request.param]))
    theirs.save_pretrained(folder)
    config = FluxConfig.from_folder(folder)
    like = shapes_of(config)["params"]
    variables = tensors.read(folder, transformer_config.table(config), like)
    return theirs, config, {"params": variables}


def inputs(height=8, width=8, tokens=5, samples=2):
    rng = np.random.default_rng(height * width + tokens)
    return (
        rng.standard_normal((samples, height, width, 4)).astype(np.float32),
        rng.random(samples).astype(np.float32),
        rng.standard_normal((samples, tokens, 20)).astype(np.float32),
        rng.standard_normal((samples, 10)).astype(np.float32),
        np.array([3.5, 1.0], np.float32)[:samples],
    )


def shapes_of(config):
    arguments = [jnp.asarray(value) for value in inputs()]
    return jax.eval_shape(Flux(config).init, jax.random.key(0), *arguments)


def run_theirs(model, latents, sigma, context, pooled, guidance):
    """Our NHWC latents in and out; `latents` may ask for its gradient."""
    samples, height, width, channels = latents.shape
    kind = latents.dtype
    scale = torch.from_numpy(guidance).to(kind)
    scale = scale if model.config.guidance_embeds else None
    tokens = latents.permute(0, 3, 1, 2).reshape(
        samples, channels, height // 2, 2, width // 2, 2
    )
    tokens = tokens.permute(0, 2, 4, 1, 3, 5).reshape(
        samples, height * width // 4, channels * 4
    )
    places = torch.zeros(height // 2, width // 2, 3)
    places[..., 1] += torch.arange(height // 2)[:, None]
    places[..., 2] += torch.arange(width // 2)[None]
    out = model(
        hidden_states=tokens,
        timestep=torch.from_numpy(sigma).to(kind),
        encoder_hidden_states=torch.from_numpy(context).to(kind),
        pooled_projections=torch.from_numpy(pooled).to(kind),
        guidance=scale,
        txt_ids=torch.zeros(context.shape[1], 3),
        img_ids=places.reshape(-1, 3),
        return_dict=False,
    )[0]
    out = out.reshape(samples, height // 2, width // 2, channels, 2, 2)
    out = out.permute(0, 1, 4, 2, 5, 3)
    return out.reshape(samples, height, width, channels)


@pytest.mark.parametrize("size", [(8, 8, 5), (6, 2, 1), (16, 8, 11)])
def test_forward(models, size):
    """Oracle: diffusers; square and not, several lengths of the text, two guidances."""
    theirs, config, variables = models
    arguments = inputs(*size)
    with torch.no_grad():
        expected = run_theirs(theirs, torch.from_numpy(arguments[0]), *arguments[1:])
    found = jax.jit(Flux(config).apply)(variables, *map(jnp.asarray, arguments))
    assert expected.abs().max() > 1e-3
    assert_close(found, expected)


def test_forward_in_shards(models):
    """Oracle: the whole weights on one device; every rule of the sharding is taken."""
    _, config, variables = models
    mesh = meshes.make_mesh({"fsdp": 2}, jax.devices()[:2])
    variables = jax.device_get(variables)
    specs = meshes.specs(variables, SHARDING_RULES, mesh)
    arguments = [jnp.asarray(value) for value in inputs()]

    def local(shards):
        return Flux(config).apply(meshes.in_shards(shards, specs), *arguments)

    program = jax.shard_map(
        local, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=False
    )
    found = jax.jit(program)(meshes.place(variables, specs, mesh))
    expected = jax.jit(Flux(config).apply)(variables, *arguments)
    assert_close(found, np.asarray(expected), 1e-6)
    blocks = specs["params"]["double_blocks"], specs["params"]["single_blocks"]
    kernels = [
        spec
        for path, spec in jax.tree_util.tree_leaves_with_path(blocks)
        if "kernel" in jax.tree_util.keystr(path)
    ]
    assert kernels and all("fsdp" in spec for spec in kernels)


def their_names(tree, config):
    """Our factors under PEFT's names, {module.lora_A: [rank, in], ...}."""
    rules = {rule.ours: rule for rule in transformer_config.table(config)}
    found = {}
    for path, leaf in traverse_util.flatten_dict(tree, sep="/").items():
        layer, factor = path.rsplit("/", 1)
        rule = rules[f"{layer}/kernel"]
        stacked = np.asarray(leaf) if rule.stacked else np.asarray(leaf)[None]
        for number, parts in enumerate(stacked):
            for template, value in zip(rule.templates, parts, strict=True):
                name = template.replace("{layer}", str(rule.first + number))
                name = name.removesuffix(".weight") + f".lora_{factor.upper()}"
                found[name] = value.T
    return found


class ExactTime(torch.nn.Module):
    """Their embedding of time and guidance, in float64."""

    def forward(self, timestep):
        frequency = torch.exp(-np.log(1e4) * torch.arange(128.0).double() / 128)
        angle = timestep.double()[:, None] * frequency
        return torch.cat([angle.cos(), angle.sin()], dim=-1)


def in_float64(model):
    model = copy.deepcopy(model).double()
    model.time_text_embed.time_proj = ExactTime()
    return model


def their_gradients(model, lora, arguments, weight):
    """(output, gradient of the input, of every factor) with a PEFT LoRA."""
    model = copy.deepcopy(model)  # wrapping its layers renames their tensors
    kind = next(model.parameters()).dtype
    modules = sorted({name.rpartition(".lora_")[0] for name in lora})
    model.add_adapter(
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules), "test"
    )
    factors = {
        name.replace(".test.weight", ""): parameter
        for name, parameter in model.to(kind).named_parameters()
        if "lora_" in name
    }
    assert factors.keys() == lora.keys()
    with torch.no_grad():
        for name, parameter in factors.items():
            parameter.copy_(torch.from_numpy(lora[name].copy()))
    given = torch.from_numpy(arguments[0]).to(kind).requires_grad_()
    out = run_theirs(model, given, *arguments[1:])
    (out * torch.from_numpy(weight).to(kind)).sum().backward()
    return [out, given.grad, *(factors[name].grad for name in sorted(factors))]


@pytest.mark.parametrize("remat", ["none", "dense", "full"])
def test_gradients(models, remat):
    """Oracle: torch's autograd, for the input and for a PEFT LoRA of random factors.

    The rounding of the time's angle is multiplied on the way, by more on some CPUs than
    on others: where we are further from diffusers in fp32 than the bar, we are as close
    to diffusers in float64 as it is itself.
    """
    theirs, config, variables = models
    adapted = dataclasses.replace(
        config,
        lora_rank=RANK,
        lora_alpha=ALPHA,
        lora_targets=transformer_config.adapted_layers(PATTERNS),
        remat=remat,
    )
    rng = np.random.default_rng(3)
    lora = jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32),
        shapes_of(adapted)["lora"],
    )
    arguments = inputs(8, 4, 7)
    weight = rng.standard_normal((2, 8, 4, 4)).astype(np.float32)

    def loss(lora, latents):
        rest = [jnp.asarray(value) for value in arguments[1:]]
        answer = Flux(adapted).apply(variables | {"lora": lora}, latents, *rest)
        return (answer * weight).sum(), answer

    (_, answer), (of_lora, of_input) = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    )(lora, arguments[0])
    named = their_names(of_lora, config)
    found = [answer, of_input, *(named[name] for name in sorted(named))]
    given = their_names(lora, config), arguments, weight
    wide = their_gradients(theirs, *given)
    if all(relative(a, b) <= BAR for a, b in zip(found, wide, strict=True)):
        return
    exact = their_gradients(in_float64(theirs), *given)
    errors = np.array([[relative(a, e), relative(b, e)] for a, b, e in
                       zip(found, wide, exact, strict=True)])  # fmt: skip
    assert (errors < 1e-3).all()
    assert errors[:, 0].max() <= 2 * errors[:, 1].max()


def relative(value, exact):
    """Largest error over the largest value."""
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    exact = exact.detach().numpy()
    return np.abs(np.asarray(value, np.float64) - exact).max() / np.abs(exact).max()


def test_written_folder_is_theirs(models, tmp_path):
    """Oracle: diffusers loads what we write; every tensor is the same bits."""
    theirs, config, variables = models
    held = {"_class_name": "FluxTransformer2DModel", **dict(theirs.config)}
    tensors.write(tmp_path, variables["params"], transformer_config.table(config), held)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path)
    for name, value in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("name, count", [("flux.1-dev", 11_901_408_320),
                                         ("flux.1-schnell", 11_891_178_560)])  # fmt: skip
def test_released_sizes(name, count):
    """Oracle: diffusers' class on the meta device: names, shapes, number."""
    config = FluxConfig.from_dict(TRANSFORMERS[name])
    arguments = [
        jax.ShapeDtypeStruct((1, 4, 4, 16), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        jax.ShapeDtypeStruct((1, 3, 4096), jnp.float32),
        jax.ShapeDtypeStruct((1, 768), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
    ]
    like = jax.eval_shape(Flux(config).init, jax.random.key(0), *arguments)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(like)) == count
    held = {key: value for key, value in TRANSFORMERS[name].items() if key[0] != "_"}
    with torch.device("meta"):
        theirs = FluxTransformer2DModel(**held)
    wanted = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert tensors.names(transformer_config.table(config), like) == wanted


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("side, text", [(64, 512), (90, 333)])
def test_cost(name, side, text):
    """Oracle: FlopCounterMode over FluxTransformer2DModel on the meta device."""
    held = {key: value for key, value in TRANSFORMERS[name].items() if key[0] != "_"}
    tokens = side * side // 4
    with torch.device("meta"):
        network = FluxTransformer2DModel(**held)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(
                hidden_states=torch.empty(1, tokens, 64),
                encoder_hidden_states=torch.empty(1, text, 4096),
                pooled_projections=torch.empty(1, 768),
                timestep=torch.empty(1),
                guidance=torch.empty(1) if held["guidance_embeds"] else None,
                txt_ids=torch.empty(text, 3),
                img_ids=torch.empty(tokens, 3),
            )
    made = cost.forward(FluxConfig.from_dict(TRANSFORMERS[name]), tokens, text)
    assert made.total == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_packing():
    """Oracle: an invariance; and the order of features, by hand."""
    latents = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    np.testing.assert_array_equal(unpack(pack(latents), 2, 3), latents)
    first = [latents[0, y, x, c] for c in range(3) for y in (0, 1) for x in (0, 1)]
    np.testing.assert_array_equal(pack(latents)[0, 0], jnp.stack(first))
    with pytest.raises(UserError, match="latents: 3x4: must be multiples of 2"):
        pack(jnp.ones((1, 3, 4, 1)))


def test_a_network_with_guidance_needs_one(models):
    """Oracle: the line, by hand."""
    _, config, variables = models
    if config.guidance_embeds:
        arguments = [jnp.asarray(value) for value in inputs()[:4]]
        with pytest.raises(UserError, match="guidance_scale: missing"):
            Flux(config).apply(variables, *arguments)
