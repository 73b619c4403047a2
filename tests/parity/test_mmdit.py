"""The transformer against diffusers' SD3Transformer2DModel, in fp32, and its names."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
from flax import traverse_util
from peft import LoraConfig

from flowgrpo_jax.models.files import tensors
from flowgrpo_jax.models.layers import timestep_embedding
from flowgrpo_jax.models.sd3 import transformer_config
from flowgrpo_jax.models.sd3.presets import TRANSFORMERS
from flowgrpo_jax.models.sd3.transformer import MMDiT, MMDiTConfig

SMALL = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 9,
}
CONFIGS = {
    "sd3-medium": SMALL,
    "sd3.5-medium": SMALL
    | {"num_layers": 4, "dual_attention_layers": [0, 1], "qk_norm": "rms_norm"},
    "sd3.5-large": SMALL | {"qk_norm": "rms_norm"},
    # Nobody released this one; diffusers takes it, so do we.
    "unlike-any": SMALL
    | {
        "num_layers": 5,
        "dual_attention_layers": [1, 4],
        "patch_size": 1,
        "out_channels": None,
        "num_attention_heads": 3,
        "caption_projection_dim": 24,
    },
}
RANK, ALPHA = 3, 5.0
# Flow-GRPO's LoRA (the authors' scripts/train_sd3.py).
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0") + tuple(
    f"add_{part}_proj" for part in "qkv"
)
TARGETS = [f"attn.{name}" for name in (*PROJECTIONS, "to_add_out")]


def randomized(model):
    """Random values everywhere: zeros and ones of a fresh model would hide much."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
        for name, parameter in model.named_parameters():
            if "norm_" in name and parameter.ndim == 1 and "linear" not in name:
                parameter.add_(1.0)
    return model.eval()


@functools.cache
def pair(name, folder):
    """(their model, our config, our variables) by way of a saved folder."""
    theirs = randomized(SD3Transformer2DModel(**CONFIGS[name]))
    theirs.save_pretrained(folder)
    config = MMDiTConfig.from_folder(folder)
    shapes = shapes_of(config)
    variables = tensors.read(
        folder,
        transformer_config.table(config),
        shapes["params"],
        [r"pos_embed\.pos_embed"],
    )
    return theirs, config, {"params": variables}


@pytest.fixture(params=CONFIGS)
def models(request, tmp_path_factory):
    return pair(request.param, tmp_path_factory.getbasetemp() / request.param)


@pytest.fixture
def medium(tmp_path_factory):
    name = "sd3.5-medium"
    return pair(name, tmp_path_factory.getbasetemp() / name)


def inputs(height=8, width=8, tokens=5, samples=2):
    rng = np.random.default_rng(height * width + tokens)
    return (
        rng.standard_normal((samples, height, width, 4)).astype(np.float32),
        rng.random(samples).astype(np.float32),
        rng.standard_normal((samples, tokens, 12)).astype(np.float32),
        rng.standard_normal((samples, 10)).astype(np.float32),
    )


def shapes_of(config):
    arguments = [jnp.asarray(value) for value in inputs()]
    return jax.eval_shape(MMDiT(config).init, jax.random.key(0), *arguments)


class ExactTime(torch.nn.Module):
    def forward(self, timestep):
        frequency = torch.exp(-np.log(1e4) * torch.arange(128.0).double() / 128)
        angle = timestep.double()[:, None] * frequency
        return torch.cat([angle.cos(), angle.sin()], dim=-1)


def in_float64(model):
    """Their model in float64, its embedding of the time too."""
    model = copy.deepcopy(model).double()
    model.time_text_embed.time_proj = ExactTime()
    return model


def run_theirs(model, latents, sigma, context, pooled):
    """NHWC in and out, as a torch tensor; `latents` may ask for its gradient."""
    kind = latents.dtype
    out = model(
        hidden_states=latents.permute(0, 3, 1, 2),
        timestep=(1000 * torch.from_numpy(sigma)).to(kind),
        encoder_hidden_states=torch.from_numpy(context).to(kind),
        pooled_projections=torch.from_numpy(pooled).to(kind),
        return_dict=False,
    )[0]
    return out.permute(0, 2, 3, 1)


def close(ours, theirs, bar=1e-4):
    """Bar of the comparison: `bar` of the largest value."""
    theirs = np.asarray(theirs)
    assert np.abs(theirs).max() > 1e-3
    assert np.abs(np.asarray(ours) - theirs).max() <= bar * np.abs(theirs).max()


def check_forward(models, arguments):
    theirs, config, variables = models
    with torch.no_grad():
        expected = run_theirs(theirs, torch.from_numpy(arguments[0]), *arguments[1:])
    arguments = [jnp.asarray(value) for value in arguments]
    close(jax.jit(MMDiT(config).apply)(variables, *arguments), expected)


def test_forward(models):
    """Oracle: diffusers, at the size and text length of training."""
    check_forward(models, inputs(8, 8, 5))


@pytest.mark.parametrize("height, width, tokens", [(6, 2, 1), (16, 8, 11)])
def test_other_sizes(medium, height, width, tokens):
    """Oracle: diffusers; not square, smaller and larger than in training."""
    check_forward(medium, inputs(height, width, tokens))


def split_lora(tree, config):
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


def test_time_embedding():
    """Oracle: float64; we are as close to it as diffusers is.

    The angle is up to 1000: its rounding to fp32 alone is 3e-5 of a sine.
    """
    timestep = 1000 * np.random.default_rng(0).random(64).astype(np.float32)
    angle = timestep[:, None] * np.exp(-np.log(1e4) * np.arange(128.0) / 128)
    exact = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    theirs = get_timestep_embedding(
        torch.from_numpy(timestep), 256, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    error = np.abs(timestep_embedding(jnp.asarray(timestep)) - exact).max()
    assert error <= 1.1 * np.abs(theirs.numpy() - exact).max() <= 1e-4


def random_lora(config):
    """(config with LoRA, random factors); not kept values are computed again."""
    adapted = dataclasses.replace(
        config, lora_rank=RANK, lora_alpha=ALPHA, remat="dense"
    )
    rng = np.random.default_rng(3)
    lora = jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32),
        shapes_of(adapted)["lora"],
    )
    return adapted, lora


def their_gradients(model, wanted, arguments, weight):
    """(output, gradient of the input, of every factor) with a PEFT LoRA."""
    model = copy.deepcopy(model)  # wrapping its layers renames their tensors
    kind = next(model.parameters()).dtype
    model.add_adapter(
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS), "test"
    )
    factors = {
        name.replace(".test.weight", ""): parameter
        for name, parameter in model.to(kind).named_parameters()
        if "lora_" in name
    }
    assert factors.keys() == wanted.keys()
    with torch.no_grad():
        for name, parameter in factors.items():
            parameter.copy_(torch.from_numpy(wanted[name].copy()))
    given = torch.from_numpy(arguments[0]).to(kind).requires_grad_()
    out = run_theirs(model, given, *arguments[1:])
    (out * torch.from_numpy(weight).to(kind)).sum().backward()
    gradients = {name: leaf.grad.numpy() for name, leaf in factors.items()}
    return out.detach().numpy(), given.grad.numpy(), gradients


def our_gradients(config, variables, lora, arguments, weight):
    def loss(lora, latents):
        rest = [jnp.asarray(value) for value in arguments[1:]]
        answer = MMDiT(config).apply(variables | {"lora": lora}, latents, *rest)
        return (answer * weight).sum(), answer

    (_, answer), (lora_grads, grads) = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    )(lora, arguments[0])
    return answer, grads, split_lora(lora_grads, config)


# Not square, for all that follows.
HERE = inputs(8, 4, 7)


def weights_of(config):
    return (
        np.random.default_rng(4)
        .standard_normal((2, 8, 4, config.out_channels))
        .astype(np.float32)
    )


@pytest.mark.parametrize("models", list(CONFIGS)[:3], indirect=True)
def test_gradients(models):
    """Oracle: torch's autograd, for the input and for a PEFT LoRA of random factors."""
    theirs, config, variables = models
    adapted, lora = random_lora(config)
    weight = weights_of(config)
    wanted = their_gradients(theirs, split_lora(lora, config), HERE, weight)
    found = our_gradients(adapted, variables, lora, HERE, weight)
    close(found[0], wanted[0])
    close(found[1], wanted[1])
    # What the last block asks of its text goes nowhere.
    unused = f"transformer_blocks.{config.num_layers - 1}.attn.add_q_proj"
    for name, value in found[2].items():
        if name.startswith(unused):
            assert not value.any() and not wanted[2][name].any()
        else:
            close(value, wanted[2][name])


@pytest.mark.parametrize("models", list(CONFIGS)[3:], indirect=True)
def test_gradients_that_rounding_moves(models):
    """Oracle: diffusers in float64; we are as close to it as it is in fp32.

    This network, which nobody released, multiplies the rounding of the time's angle
    (see test_time_embedding): both stand 7e-4 from float64, so that they can be more
    than the bar apart.
    """
    theirs, config, variables = models
    adapted, lora = random_lora(config)
    weight, split = weights_of(config), split_lora(lora, config)
    exact = their_gradients(in_float64(theirs), split, HERE, weight)
    wide = their_gradients(theirs, split, HERE, weight)
    found = our_gradients(adapted, variables, lora, HERE, weight)

    def errors(values):
        pairs = [(values[0], exact[0]), (values[1], exact[1])]
        lora = [(values[2][name], exact[2][name]) for name in exact[2]]
        largest = [relative(*pair) for pair in pairs]
        return np.array([*largest, max(relative(*pair) for pair in lora)])

    print("output, input, LoRA from float64:", errors(found), errors(wide))
    assert (errors(found) <= 2 * errors(wide)).all()
    assert (errors(wide) < 5e-3).all()


def relative(value, exact):
    """Largest error over the largest value; 0 where all must be zero and is."""
    largest = np.abs(exact).max()
    error = np.abs(np.asarray(value, np.float64) - exact).max()
    return error / largest if largest else error


def test_stored_positions_are_used(tmp_path):
    """Oracle: diffusers with a table of its own in the file, cropped two ways."""
    theirs = randomized(SD3Transformer2DModel(**SMALL))
    theirs.pos_embed.pos_embed.normal_(generator=torch.Generator().manual_seed(1))
    theirs.save_pretrained(tmp_path)
    config = dataclasses.replace(
        MMDiTConfig.from_folder(tmp_path), position_crop=(4, 5)
    )
    table, like = transformer_config.table(config), shapes_of(config)
    position = [r"pos_embed\.pos_embed"]
    variables = {
        "params": tensors.read(tmp_path, table, like["params"], position),
        "buffers": tensors.read(tmp_path, table, like["buffers"], [".*"]),
    }
    for height, width in ((8, 6), (6, 4)):
        check_forward((theirs, config, variables), inputs(height, width))


@pytest.mark.parametrize("size", [9, 12])
def test_positional_tables(size):
    """Oracle: diffusers' crop, for every number of rows and columns it allows."""
    from diffusers.models.embeddings import PatchEmbed

    from flowgrpo_jax.models.sd3 import positions

    embed = PatchEmbed(8, 8, 2, 4, 16, pos_embed_max_size=size)
    for rows, columns in np.ndindex(size, size):
        rows, columns = rows + 1, columns + 1
        crop = embed.cropped_pos_embed(2 * rows, 2 * columns).numpy()
        found = positions.table(16, size, 4, rows, columns).reshape(1, -1, 16)
        np.testing.assert_allclose(found, crop, atol=1e-6)


def test_written_folder_is_theirs(models, tmp_path):
    """Oracle: diffusers loads what we write; every tensor is the same bits."""
    theirs, config, variables = models
    size = config.pos_embed_max_size
    table = {"table": theirs.pos_embed.pos_embed.numpy().reshape(size, size, -1)}
    tree = {**variables["params"]}
    tree["pos_embed"] = tree["pos_embed"] | table
    tensors.write(
        tmp_path, tree, transformer_config.table(config), dict(theirs.config), 10_000
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path)
    again, before = loaded.state_dict(), theirs.state_dict()
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)


# -- The released sizes --------------------------------------------------------------

# golden_numbers.md 15 for the two SD3.5; SD3-medium is counted by diffusers below.
COUNTS = {"sd3.5-medium": 2_243_171_520, "sd3.5-large": 8_056_627_520}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_released_sizes(name):
    """Oracle: diffusers' class on the meta device; names, shapes and counts."""
    given = {k: v for k, v in TRANSFORMERS[name].items() if k[0] != "_"}
    with torch.device("meta"):
        # The class computes its table whatever the device: a small one stands in.
        theirs = SD3Transformer2DModel(**given | {"pos_embed_max_size": 4})
    state = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    size, config = given["pos_embed_max_size"], MMDiTConfig.from_dict(given)
    state["pos_embed.pos_embed"] = (1, size**2, config.width)

    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((1, 64, 64, 16), (1,), (1, 205, 4096), (1, 2048))
    ]
    ours = jax.eval_shape(MMDiT(config).init, jax.random.key(0), *arguments)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(ours))
    assert count == sum(value.numel() for value in theirs.parameters())
    assert count == COUNTS.get(name, count)
    whole = jax.ShapeDtypeStruct((size, size, config.width), jnp.float32)
    ours["pos_embed"]["table"] = whole
    assert tensors.names(transformer_config.table(config), ours) == state
