"""Names of layers in LoRA files, fused layers, and what files hold beside them."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import lora_reading
from flowgrpo_jax.models.files.lora_names import LayerNames
from flowgrpo_jax.models.files.original_names import OriginalNames, block_names

RANK, IN = 2, 5
# One block of a network whose query, key and MLP are of different widths.
SHAPES = {
    "blocks.0.to_q": (4, IN),
    "blocks.0.to_k": (6, IN),
    "blocks.0.mlp": (3, IN),
    "norm_out": (8, IN),
}
NAMES = LayerNames(
    SHAPES,
    OriginalNames(
        block_names(
            "b.{layer}.",
            "blocks.{layer}.",
            {"linear1": ("to_q", "to_k", "mlp"), "linear2": "to_q"},
        )
        | {"final.mod": ("norm_out",)},
        swapped=frozenset({"norm_out"}),
    ),
)


def drawn(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def kohya(name, a, b, alpha):
    name = f"lora_unet_{name}"
    return {
        f"{name}.lora_down.weight": a,
        f"{name}.lora_up.weight": b,
        f"{name}.alpha": np.float32(alpha),
    }


def read(folder, tensors):
    path = folder / "lora.safetensors"
    save_file({name: np.asarray(value) for name, value in tensors.items()}, path)
    return lora_reading.read(path, NAMES)


def changes(layers):
    return {name: layer.strength * layer.b @ layer.a for name, layer in layers.items()}


def test_a_fused_layer_is_split(tmp_path):
    """By hand: rows of B in their order; the same A and the same strength."""
    a, b = drawn(RANK, IN), drawn(13, RANK)
    layers = read(tmp_path, kohya("b_0_linear1", a, b, 3.0))
    whole = 3.0 / RANK * b @ a
    found = changes(layers)
    wanted = {"to_q": whole[:4], "to_k": whole[4:10], "mlp": whole[10:]}
    assert found.keys() == {f"blocks.0.{name}" for name in wanted}
    for name, rows in wanted.items():
        np.testing.assert_allclose(found[f"blocks.0.{name}"], rows, 1e-5)
        assert layers[f"blocks.0.{name}"].rank == RANK


def test_layers_that_were_trained_apart_keep_their_rank(tmp_path):
    """Oracle: kohya's split_qkv: A on one another, B on the diagonal; one alpha."""
    parts = [
        (drawn(RANK, IN) + n, drawn(rows, RANK)) for n, rows in enumerate((4, 6, 3))
    ]
    a, b = np.concatenate([a for a, _ in parts]), np.zeros((13, 3 * RANK), np.float32)
    row = 0
    for number, (_, up) in enumerate(parts):
        b[row : row + len(up), number * RANK : (number + 1) * RANK] = up
        row += len(up)
    layers = read(tmp_path, kohya("b_0_linear1", a, b, 3.0))
    for layer, (down, up) in zip(layers.values(), parts, strict=True):
        np.testing.assert_array_equal(layer.a, down)
        np.testing.assert_array_equal(layer.b, up)
        assert layer.strength == 3.0 / (3 * RANK)  # as it was saved: of the whole rank
    nothing = read(tmp_path, kohya("b_0_linear1", a, 0 * b, 3.0))
    assert [layer.rank for layer in nothing.values()] == [3 * RANK] * 3


def test_halves_that_come_in_another_order(tmp_path):
    """By hand: the rows of shift and scale change places, by either name of one layer."""
    a, b = drawn(RANK, IN), drawn(8, RANK)
    tensors = {
        "diffusion_model.final.mod.lora_A.weight": a,
        "diffusion_model.final.mod.lora_B.weight": b,
    }
    found = changes(read(tmp_path, tensors))["norm_out"]
    np.testing.assert_allclose(found, np.concatenate([b[4:], b[:4]]) @ a, 1e-5)
    tensors = {"norm_out.lora_A.weight": a, "norm_out.lora_B.weight": b}
    np.testing.assert_allclose(
        changes(read(tmp_path, tensors))["norm_out"], b @ a, 1e-5
    )


def test_every_layer_has_a_rank_and_an_alpha_of_its_own(tmp_path):
    """By hand: alpha / rank of each."""
    one, other = (drawn(1, IN), drawn(4, 1)), (drawn(3, IN), drawn(6, 3))
    layers = read(
        tmp_path,
        kohya("blocks_0_to_q", *one, 5.0) | kohya("blocks_0_to_k", *other, 0.6),
    )
    strengths = {name: layer.strength for name, layer in layers.items()}
    assert strengths == pytest.approx({"blocks.0.to_q": 5.0, "blocks.0.to_k": 0.2})


def test_no_alpha_is_the_rank_of_each(tmp_path, capsys):
    """Oracle: diffusers' rule; said in one line."""
    tensors = kohya("blocks_0_to_q", drawn(1, IN), drawn(4, 1), 0)
    tensors |= kohya("blocks_0_to_k", drawn(3, IN), drawn(6, 3), 0)
    tensors = {name: x for name, x in tensors.items() if not name.endswith("alpha")}
    assert {layer.strength for layer in read(tmp_path, tensors).values()} == {1.0}
    assert capsys.readouterr().out.count("\n") == 1


TEXT_ENCODERS = [
    ("text_encoder.text_model.encoder.layers.0.q_proj.lora_A.weight", "text_encoder"),
    ("text_encoder_2.x.lora_B.weight", "text_encoder_2"),
    ("text_encoder_2.x.lora_linear_layer.up.weight", "text_encoder_2"),
    ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "lora_te1"),
    ("lora_te3_encoder_block_0_layer_0_SelfAttention_q.alpha", "lora_te3"),
    ("text_encoders.clip_l.transformer.x.lora_A.weight", "text_encoders.clip_l"),
    ("base_model.model.text_model.encoder.x.lora_A.weight", "text_model"),
]


@pytest.mark.parametrize("name, part", TEXT_ENCODERS)
def test_text_encoders_are_left_out_and_that_is_said(tmp_path, capsys, name, part):
    """Oracle: the line, by hand; the transformer's part is as it would be alone."""
    alone = kohya("blocks_0_to_q", drawn(1, IN), drawn(4, 1), 2.0)
    wanted = changes(read(tmp_path, alone))
    assert not capsys.readouterr().out
    found = changes(read(tmp_path, alone | {name: np.ones((7, 9), np.float32)}))
    np.testing.assert_array_equal(found["blocks.0.to_q"], wanted["blocks.0.to_q"])
    said = capsys.readouterr().out
    assert said.startswith("train.lora_path: ") and said.count("\n") == 1
    assert f": {part}: 1 tensors are left out: a text encoder is not adapted" in said
    with pytest.raises(UserError, match="holds no LoRA of a transformer"):
        read(tmp_path, {name: np.ones((7, 9), np.float32)})


@pytest.mark.parametrize(
    "tensors, line",
    [
        (
            kohya("b_0_linear1", drawn(2, IN), drawn(12, 2), 1),
            r"lora_unet_b_0_linear1: .* matrix of \[12, 5\]: .* is \[13, 5\]",
        ),
        (
            kohya("blocks_0_to_q", drawn(2, 7), drawn(4, 2), 1),
            r"blocks_0_to_q: .* matrix of \[4, 7\]: .* is \[4, 5\]",
        ),
        (
            kohya("b_0_linear1", drawn(2, IN), drawn(13, 2), 1)
            | kohya("blocks_0_to_k", drawn(2, IN), drawn(6, 2), 1),
            "stands there under two names",
        ),
        (
            kohya("b_1_linear1", drawn(2, IN), drawn(13, 2), 1),
            "lora_unet_b_1_linear1: this transformer has no linear layer of that name",
        ),
        (
            {"blocks_0_to_q.lora_A.weight": drawn(2, IN)}
            | {"blocks_0_to_q.lora_B.weight": drawn(4, 2)},
            "blocks_0_to_q: this transformer has no linear layer .* like blocks.0.to_q",
        ),
        (
            {"unet.blocks.0.to_q.lora_A.weight": drawn(2, IN)}
            | {"unet.blocks.0.to_q.lora_B.weight": drawn(4, 2)},
            "unet.blocks.0.to_q: this transformer has no linear layer",
        ),
    ],
)
def test_what_does_not_fit_the_transformer_is_named(tmp_path, tensors, line):
    """Oracle: the line, by hand."""
    with pytest.raises(UserError, match=f"^train.lora_path: {tmp_path}.*{line}"):
        read(tmp_path, tensors)
