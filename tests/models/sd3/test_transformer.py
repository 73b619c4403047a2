"""The transformer: its parameters, its tables, its blocks, its LoRA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.layers import Dense, LayerNorm
from flowgrpo_jax.models.sd3 import positions, transformer, transformer_config
from flowgrpo_jax.models.sd3.transformer import MMDiT, MMDiTConfig
from flowgrpo_jax.models.sd3.transformer_config import groups

SD3 = MMDiTConfig(
    sample_size=8,
    patch_size=2,
    in_channels=4,
    out_channels=5,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    pos_embed_max_size=6,
)
# SD3.5-medium in small: a prefix of dual blocks, queries and keys normalised.
MEDIUM = dataclasses.replace(
    SD3, num_layers=4, dual_attention_layers=(0, 1), qk_norm="rms_norm"
)
RANK = 3

# Layers and the shapes of their kernels (width 16); every layer has a bias too.
AROUND = {
    "pos_embed/proj": (16, 16),
    "time_text_embed/timestep_1": (256, 16),
    "time_text_embed/timestep_2": (16, 16),
    "time_text_embed/text_1": (10, 16),
    "time_text_embed/text_2": (16, 16),
    "context_embedder": (12, 16),
    "norm_out": (16, 32),
    "proj_out": (16, 20),
}
PLAIN = {
    "norm1": (16, 96),
    "norm1_context": (16, 96),
    "attn/qkv": (16, 48),
    "attn/add_qkv": (16, 48),
    "attn/to_out": (16, 16),
    "attn/to_add_out": (16, 16),
    "ff/proj": (16, 64),
    "ff/out": (64, 16),
    "ff_context/proj": (16, 64),
    "ff_context/out": (64, 16),
}
DUAL = PLAIN | {"norm1": (16, 144), "attn2/qkv": (16, 48), "attn2/to_out": (16, 16)}
LAST = {
    "norm1": (16, 96),
    "norm1_context": (16, 32),
    "attn/qkv": (16, 48),
    "attn/add_qkv": (16, 48),
    "attn/to_out": (16, 16),
    "ff/proj": (16, 64),
    "ff/out": (64, 16),
}
JOINT_NORMS = ("attn/norm_q", "attn/norm_k", "attn/add_norm_q", "attn/add_norm_k")
DUAL_NORMS = ("attn2/norm_q", "attn2/norm_k")


def spec(layers, prefix="", depth=(), norms=()):
    """Parameters (name -> shape) of Dense layers and RMS norms under a prefix."""
    shapes = {}
    for name, kernel in layers.items():
        shapes[f"{prefix}{name}/kernel"] = (*depth, *kernel)
        shapes[f"{prefix}{name}/bias"] = (*depth, kernel[1])
    return shapes | {f"{prefix}{name}/scale": (*depth, 8) for name in norms}


SPECS = {
    SD3: spec(AROUND)
    | spec(PLAIN, "blocks/block/", depth=(2,))
    | spec(LAST, "last_block/"),
    MEDIUM: spec(AROUND)
    | spec(DUAL, "dual_blocks/block/", (2,), JOINT_NORMS + DUAL_NORMS)
    | spec(PLAIN, "blocks/block/", (1,), JOINT_NORMS)
    | spec(LAST, "last_block/", (), JOINT_NORMS),
}


def inputs(samples=3, seed=0):
    """(latents, sigma, context, pooled), random."""
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((samples, 8, 8, 4)).astype(np.float32),
        rng.random(samples).astype(np.float32),
        rng.standard_normal((samples, 5, 12)).astype(np.float32),
        rng.standard_normal((samples, 10)).astype(np.float32),
    )


def shapes_of(tree) -> dict:
    flat = traverse_util.flatten_dict(tree, sep="/")
    return {name: leaf.shape for name, leaf in flat.items()}


def shape_tree(config):
    """Shapes and types of all variables, without computing them."""
    return jax.eval_shape(MMDiT(config).init, jax.random.key(0), *inputs())


@functools.cache
def random_variables(config):
    """All variables random: the zeros of a fresh model would hide everything."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: np.float32(0.3) * rng.standard_normal(leaf.shape, np.float32),
        shape_tree(config),
    )


@functools.cache
def compiled(config):
    return jax.jit(MMDiT(config).apply)


def run(config, variables, arguments):
    return np.asarray(compiled(config)(variables, *arguments))


@pytest.mark.parametrize("config", [SD3, MEDIUM], ids=["sd3", "sd3.5-medium"])
def test_parameters(config):
    """Oracle: the spec above, from diffusers' SD3Transformer2DModel, q k v fused."""
    assert shapes_of(shape_tree(config)["params"]) == SPECS[config]


def test_timestep_embedding():
    """Closed form: cos then sin of t * 10000^(-i/128), in float64."""
    timestep = np.array([0.0, 1.0, 17.5, 1000.0])
    angle = timestep[:, None] * 10_000.0 ** (-np.arange(128) / 128)
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    answer = transformer.timestep_embedding(jnp.asarray(timestep, jnp.float32))
    assert answer.dtype == jnp.float32
    # Angles up to 1000 in fp32 are known to 6e-5.
    np.testing.assert_allclose(answer, expected, atol=2e-4)


def test_unpatchify_inverts_the_order_of_patches():
    """Oracle: an invariance; with an identity projection tokens are the picture."""
    config = dataclasses.replace(SD3, pos_embed_max_size=8)
    picture = np.random.default_rng(0).random((2, 6, 10, 4), np.float32)
    identity = {"proj": {"kernel": jnp.eye(16), "bias": jnp.zeros(16)}}
    tokens = transformer._Patchify(config).apply(
        {"params": identity}, jnp.asarray(picture)
    )
    table = positions.table(16, 8, 4, 3, 5).reshape(15, 16)
    back = transformer.unpatchify(tokens - table, 3, 5, 2)
    np.testing.assert_allclose(back, picture, atol=1e-6)


def test_first_token_is_the_top_left_patch():
    """Oracle: a hand-made picture; features are ordered (row, column, channel)."""
    tokens = jnp.arange(4.0 * 8).reshape(1, 4, 8)
    picture = np.asarray(transformer.unpatchify(tokens, 2, 2, 2))
    np.testing.assert_array_equal(picture[0, :2, :2].reshape(-1), tokens[0, 0])
    np.testing.assert_array_equal(picture[0, :2, 2:].reshape(-1), tokens[0, 1])
    np.testing.assert_array_equal(picture[0, 2:, :2].reshape(-1), tokens[0, 2])


def one_by_one(config, params, latents, sigma, context, pooled):
    """The transformer with its scans unrolled by hand."""
    cfg = config

    def block(params, *args, dual, last=False):
        return transformer._Block(cfg, dual=dual, last=last).apply(
            {"params": params}, *args
        )

    def dense(features, name, x):
        return Dense(features).apply({"params": params[name]}, x)

    image = transformer._Patchify(cfg).apply({"params": params["pos_embed"]}, latents)
    condition = transformer._TimeText(cfg).apply(
        {"params": params["time_text_embed"]}, sigma, pooled
    )
    condition = nn.silu(condition)
    text = dense(cfg.width, "context_embedder", context)
    for name, depth, dual in (("dual_blocks", 2, True), ("blocks", 1, False)):
        for i in range(depth):
            sliced = jax.tree.map(lambda leaf, i=i: leaf[i], params[name]["block"])
            image, text = block(sliced, image, text, condition, dual=dual)
    image, _ = block(
        params["last_block"], image, text, condition, dual=False, last=True
    )
    changes = dense(2 * cfg.width, "norm_out", condition)[:, None]
    scale, shift = jnp.split(changes, 2, axis=-1)
    image = LayerNorm().apply({}, image) * (1 + scale) + shift
    return transformer.unpatchify(dense(20, "proj_out", image), 4, 4, 2)


def test_scan_is_blocks_one_by_one():
    """Oracle: an invariance; the same blocks with sliced parameters, fp32 rounding."""
    variables = random_variables(MEDIUM)
    by_hand = jax.jit(functools.partial(one_by_one, MEDIUM))
    np.testing.assert_allclose(
        run(MEDIUM, variables, inputs()),
        by_hand(variables["params"], *inputs()),
        rtol=1e-4,
        atol=1e-4,
    )


def test_samples_do_not_see_each_other():
    """Oracle: an invariance; other neighbours in the batch, the same answer."""
    here, there = inputs(), inputs(seed=5)
    mixed = [np.concatenate([a[:1], b[1:]]) for a, b in zip(here, there, strict=True)]
    variables = random_variables(MEDIUM)
    first, second = (run(MEDIUM, variables, batch) for batch in (here, mixed))
    np.testing.assert_allclose(first[0], second[0], rtol=1e-5, atol=1e-5)
    assert np.abs(first[1] - second[1]).max() > 0.1


def test_every_input_matters():
    """Oracle: construction; each of the four inputs changes the answer."""
    here, there = inputs(), inputs(seed=5)
    variables = random_variables(MEDIUM)
    answer = run(MEDIUM, variables, here)
    for k in range(4):
        changed = [*here[:k], there[k], *here[k + 1 :]]
        assert np.abs(run(MEDIUM, variables, changed) - answer).max() > 1e-2, k


# -- LoRA --------------------------------------------------------------------------

ADAPTED = dataclasses.replace(MEDIUM, lora_rank=RANK, lora_alpha=2.0 * RANK)


def fresh_lora(config):
    """The adapter as it starts; only it is computed."""

    def init():
        arguments = map(jnp.asarray, inputs())
        return MMDiT(config).init(jax.random.key(0), *arguments)["lora"]

    return jax.jit(init)()


def test_lora_is_on_the_joint_attention_only():
    """Oracle: Flow-GRPO's target modules: to_q k v, add_q k v, to_out, to_add_out."""
    qkv = {"a": (3, 16, RANK), "b": (3, RANK, 16)}
    out = {"a": (1, 16, RANK), "b": (1, RANK, 16)}
    layers = {"qkv": qkv, "add_qkv": qkv, "to_out": out, "to_add_out": out}
    expected = {}
    for prefix, depth in (
        ("dual_blocks/block/attn", (2,)),
        ("blocks/block/attn", (1,)),
        ("last_block/attn", ()),
    ):
        for layer, factors in layers.items():
            for name, shape in factors.items():
                expected[f"{prefix}/{layer}/{name}"] = (*depth, *shape)
    del expected["last_block/attn/to_add_out/a"]  # the last text stream goes nowhere
    del expected["last_block/attn/to_add_out/b"]
    shapes = shape_tree(ADAPTED)
    assert shapes_of(shapes["lora"]) == expected
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
    assert shapes_of(shapes["params"]) == SPECS[MEDIUM]


@pytest.mark.parametrize(
    "patterns, layers",
    [
        ((r"attn\.(to|add)_.*",), ADAPTED.lora_targets),
        (("attn.to_out.0", "proj_out"), ("attn/to_out", "proj_out")),
        (
            (r"attn2\..*", r"ff\.net.*"),
            ("attn2/qkv", "attn2/to_out", "ff/proj", "ff/out"),
        ),
        (("attn.to_q", "attn.to_k", "attn.to_v"), ("attn/qkv",)),
    ],
)
def test_lora_targets(patterns, layers):
    """By hand: diffusers' module names, from the end, as PEFT takes them."""
    assert set(transformer_config.adapted_layers(patterns)) == set(layers)


@pytest.mark.parametrize(
    "patterns, message",
    [
        (("to_q",), "are one layer here: name all of them or none"),
        (("attn.to_out.0", "attn.nothing"), "attn.nothing: names no layer"),
        (("ttn.to_out.0",), "ttn.to_out.0: names no layer"),
        (("attn(",), r"attn\(: is no regular expression \(missing \)"),
        (("a{2,1}",), "is no regular expression"),
        (("a)|(b",), "is no regular expression"),
    ],
)
def test_lora_targets_that_cannot_be(patterns, message):
    """Oracle: how the line goes on, by hand."""
    with pytest.raises(UserError, match=f"train.lora_targets: .*{message}"):
        transformer_config.adapted_layers(patterns)


@pytest.mark.parametrize("rank, layers", [(3, 4), (1, 2), (8, 6)])
def test_lora_parameter_count(rank, layers):
    """Closed form: 8 projections of 2 * rank * width a block, 7 in the last one."""
    config = dataclasses.replace(ADAPTED, lora_rank=rank, num_layers=layers)
    config = dataclasses.replace(config, dual_attention_layers=(0,))
    found = sum(leaf.size for leaf in jax.tree.leaves(shape_tree(config)["lora"]))
    assert found == 2 * rank * config.width * (8 * layers - 1)


def test_lora_starts_as_the_base():
    """Oracle: an invariance; with B = 0 the adapter changes no bit."""
    variables = random_variables(MEDIUM)
    fresh = fresh_lora(ADAPTED)
    factors = traverse_util.flatten_dict(fresh)
    assert all((leaf != 0).all() for path, leaf in factors.items() if path[-1] == "a")
    assert all((leaf == 0).all() for path, leaf in factors.items() if path[-1] == "b")
    base = run(MEDIUM, variables, inputs())
    adapted = run(ADAPTED, variables | {"lora": fresh}, inputs())
    np.testing.assert_array_equal(base, adapted)
    assert np.abs(base - run(ADAPTED, random_variables(ADAPTED), inputs())).max() > 0.1


def test_lora_layers_start_differently():
    """Oracle: Flow-GRPO's A ~ N(0, 1 / rank^2), drawn apart in every scanned layer."""
    wide = dataclasses.replace(ADAPTED, num_attention_heads=16, lora_rank=4)
    fresh = fresh_lora(wide)
    a = np.asarray(fresh["dual_blocks"]["block"]["attn"]["qkv"]["a"])
    assert a.std() == pytest.approx(1 / 4, rel=0.06)
    assert np.abs(a[0] - a[1]).max() > 0.1
    assert np.abs(a[:, 0] - a[:, 1]).max() > 0.1


def test_bfloat16_residual_stream():
    """Oracle: the type rules; tokens are bf16, and close to what fp32 gives."""
    config = dataclasses.replace(MEDIUM, dtype=jnp.bfloat16)
    variables = random_variables(MEDIUM)

    def watched(*arguments):
        return MMDiT(config).apply(
            variables,
            *arguments,
            capture_intermediates=True,
            mutable=["intermediates"],
        )

    out, seen = jax.eval_shape(watched, *inputs())
    seen = seen["intermediates"]
    # A scan keeps the type of its carry: what goes in and comes out is enough.
    streams = [seen["pos_embed"], seen["context_embedder"], seen["last_block"]]
    types = {leaf.dtype for leaf in jax.tree.leaves((streams, out))}
    assert types == {jnp.dtype(jnp.bfloat16)}
    wide = run(MEDIUM, variables, inputs())
    narrow = run(config, variables, inputs()).astype(np.float32)
    assert np.abs(wide - narrow).max() < 0.1 * np.abs(wide).max()


# -- Rematerialisation ----------------------------------------------------------------


def residual_size(config):
    """Numbers that a backward pass with respect to LoRA and latents keeps."""
    variables = shape_tree(config)

    def kept(lora, latents, variables, *rest):
        def answer(lora, latents):
            return MMDiT(config).apply(variables | {"lora": lora}, latents, *rest)

        return jax.vjp(answer, lora, latents)[1]

    latents, *rest = inputs()
    shapes = jax.eval_shape(kept, variables["lora"], latents, variables, *rest)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_policies_keep_less_and_less():
    """Oracle: the order of the policies, by the sizes that tracing gives."""
    small = dataclasses.replace(SD3, num_layers=2, lora_rank=RANK)
    sizes = [
        residual_size(dataclasses.replace(small, remat=policy))
        for policy in ("none", "dense", "attention", "full")
    ]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


@pytest.mark.parametrize("remat", ["dense", "full"])
def test_update_sees_what_the_rollout_saw(remat):
    """Oracle: bit equality in bf16 of a forward pass alone and inside a gradient."""
    config = dataclasses.replace(ADAPTED, remat=remat, dtype=jnp.bfloat16)
    variables = random_variables(ADAPTED)

    def loss(lora, *arguments):
        answer = MMDiT(config).apply(variables | {"lora": lora}, *arguments)
        return jnp.square(answer.astype(jnp.float32)).sum(), answer

    rollout = run(config, variables, inputs())
    (_, update), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        variables["lora"], *inputs()
    )
    np.testing.assert_array_equal(rollout, update)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_programs_do_not_grow_with_depth():
    """Oracle: counting; the same equations for 4 and for 9 layers, gradients too."""

    def lines(layers):
        config = dataclasses.replace(
            SD3, num_layers=layers, remat="dense", lora_rank=RANK
        )
        variables = shape_tree(config)

        def loss(lora, params, *arguments):
            both = {"params": params, "lora": lora}
            return MMDiT(config).apply(both, *arguments).sum()

        program = jax.make_jaxpr(jax.grad(loss))
        traced = program(variables["lora"], variables["params"], *inputs())
        return len(str(traced).splitlines())

    assert lines(4) == lines(9)


# -- Configurations ---------------------------------------------------------------------


def test_groups():
    """By hand: runs of one kind, the last block apart."""
    layout = [tuple(group) for group in groups(MEDIUM)]
    assert layout == [("dual_blocks", 0, 2, True), ("blocks", 2, 1, False)]
    mixed = dataclasses.replace(SD3, num_layers=7, dual_attention_layers=(1, 2, 5))
    assert [tuple(group) for group in groups(mixed)] == [
        ("blocks", 0, 1, False),
        ("dual_blocks", 1, 2, True),
        ("blocks_3", 3, 2, False),
        ("dual_blocks_5", 5, 1, True),
    ]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"qk_norm": "layer_norm"}, 'qk_norm: "layer_norm": only null or "rms_norm"'),
        ({"caption_projection_dim": 16}, r"caption_projection_dim: 16: .* = 1152"),
        ({"num_layers": 0}, r"num_layers: 0: must be in 1 \.\.\. 1000"),
        ({"patch_size": "2"}, 'patch_size: "2": must be of the type int'),
        ({"dual_attention_layers": [18]}, r"dual_attention_layers: \(18,\)"),
        ({"flavour": 1}, "flavour: 1: not supported"),
        ({"dual_attention_layers": 5}, "dual_attention_layers: 5: must be of the type"),
        ({"dual_attention_layers": ["a"]}, "dual_attention_layers: .*: must be of"),
        ({"num_layers": 10**9}, "num_layers: 1000000000: must be in"),
        ({"sample_size": True}, "sample_size: true: must be of the type int"),
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel: must be"),
        ({"attention_head_dim": 1, "caption_projection_dim": 18}, "multiple of 4"),
    ],
)
def test_unsupported_configurations(given, message):
    """Oracle: the contract; one line with the key, the value and what is allowed."""
    with pytest.raises(UserError, match=message) as caught:
        MMDiTConfig.from_dict(given)
    assert "\n" not in str(caught.value)


def test_defaults_are_those_of_diffusers():
    """Oracle: SD3Transformer2DModel's signature, which an empty file stands for."""
    config = MMDiTConfig.from_dict({"_diffusers_version": "0.42.1"})
    assert (config.num_layers, config.width, config.pos_embed_max_size) == (
        18,
        1152,
        96,
    )
    assert (
        MMDiTConfig.from_dict({"in_channels": 3, "out_channels": None}).out_channels
        == 3
    )


def test_latents_must_be_whole_patches():
    """Oracle: the contract."""
    latents, *rest = map(jnp.asarray, inputs())
    with pytest.raises(UserError, match="7x8: must be multiples of patch_size 2"):
        jax.eval_shape(MMDiT(SD3).init, jax.random.key(0), latents[:, 1:], *rest)
