"""Mask2Former against transformers (torch, CPU, fp32): network and post-processing."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models import mask2former
from flowgrpo_jax.models.mask2former_config import Mask2FormerConfig
from flowgrpo_jax.models.mask2former_instances import find_instances, unpack_mask
from tests.parity.oracle import assert_close

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PARTS = ("backbone", "pixels")
LABELS = {i: f"thing {i}" for i in range(5)}


def reference_config(hidden_dim):
    backbone = transformers.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[2, 1, 1, 1],
        num_heads=[1, 2, 2, 4],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=16,
        hidden_dim=hidden_dim,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=5,
        num_attention_heads=4,
        dim_feedforward=32,
        num_queries=10,
        id2label=LABELS,
    )


def reference_model(hidden_dim=32):
    """A small network with every parameter random: biases and tables start at 0."""
    torch.manual_seed(0)
    config = reference_config(hidden_dim)
    model = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name or name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(their model, our config, our parameters), by way of a saved folder."""
    folder = tmp_path_factory.mktemp("mask2former")
    theirs = reference_model()
    theirs.save_pretrained(folder)
    config = Mask2FormerConfig.from_folder(folder)
    return theirs, config, mask2former.load(folder, config)


@pytest.fixture(scope="module")
def outputs(pair):
    """Theirs, ours and our parts', of images whose sides are multiples of nothing."""
    theirs, config, params = pair
    pixels = np.random.default_rng(0).normal(size=(2, 70, 58, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs(channels_first(pixels), output_hidden_states=True)

    @jax.jit
    def run(params, pixels):
        return mask2former.Mask2Former(config).apply(
            {"params": params},
            pixels,
            capture_intermediates=lambda module, _: module.name in PARTS,
        )

    found, captured = run(params, pixels)
    parts = captured["intermediates"]
    return wanted, found, {name: parts[name]["__call__"][0] for name in PARTS}


def channels_first(x):
    return torch.tensor(np.moveaxis(np.asarray(x), -1, 1).copy())


def test_backbone(outputs):
    wanted, _, parts = outputs
    for ours, theirs in zip(
        parts["backbone"], wanted.encoder_hidden_states, strict=True
    ):
        assert_close(channels_first(ours), theirs)


def test_pixel_decoder(outputs):
    wanted, _, parts = outputs
    embeddings, maps = parts["pixels"]
    assert_close(channels_first(embeddings), wanted.pixel_decoder_last_hidden_state)
    for ours, theirs in zip(maps, wanted.pixel_decoder_hidden_states, strict=True):
        assert_close(channels_first(ours), theirs)


def test_classes_and_masks(outputs):
    wanted, found, _ = outputs
    assert_close(found.class_logits, wanted.class_queries_logits)
    assert_close(found.mask_logits, wanted.masks_queries_logits)


def test_every_tensor_has_a_place_when_the_decoders_differ_in_width(tmp_path):
    """The oracle is the file that transformers writes; `load` refuses any difference."""
    reference_model(hidden_dim=16).save_pretrained(tmp_path)
    params = mask2former.load(tmp_path, Mask2FormerConfig.from_folder(tmp_path))
    assert params["queries"]["input2"]["kernel"].shape == (32, 16)


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ((), "pre_norm", True),
        (("backbone_config",), "use_absolute_embeddings", True),
        (("backbone_config",), "out_features", ["stage4"]),
        (("backbone_config",), "model_type", "resnet"),
    ],
)
def test_refuses_what_it_does_not_compute(where, key, value):
    config = reference_config(32).to_dict()
    config["id2label"] = {str(i): name for i, name in LABELS.items()}
    part = config
    for name in where:
        part = part[name]
    part[key] = value
    with pytest.raises(UserError, match=f"{key}: "):
        Mask2FormerConfig.from_dict(config)


@pytest.mark.parametrize("size", [(512, 512), (200, 300), (384, 384)])
def test_post_processing(size):
    """Scores, labels, masks and their boxes, in the order of the scores."""
    draw = np.random.default_rng(1)
    classes = draw.normal(scale=4, size=(2, 10, 6)).astype(np.float32)
    coarse = torch.tensor(draw.normal(size=(2, 10, 6, 6)), dtype=torch.float32)
    masks = torch.nn.functional.interpolate(coarse, (96, 96), mode="bicubic") - 0.7
    masks[0, 3] = -1  # a query without a pixel
    outputs = types.SimpleNamespace(
        class_queries_logits=torch.tensor(classes), masks_queries_logits=masks
    )
    threshold = 0.1
    wanted = (
        transformers.Mask2FormerImageProcessorPil().post_process_instance_segmentation(
            outputs, threshold, target_sizes=[size] * 2, return_binary_maps=True
        )
    )
    segmentation = mask2former.Segmentation(
        jnp.asarray(classes), jnp.asarray(masks.numpy())
    )
    found = jax.device_get(
        jax.jit(find_instances, static_argnums=1)(segmentation, size)
    )
    for image, result in enumerate(wanted):
        info = result["segments_info"]
        order = np.argsort([-one["score"] for one in info])
        maps = result["segmentation"].numpy().astype(bool)
        kept = np.flatnonzero(found.score[image] >= threshold)
        kept = kept[np.argsort(-found.score[image, kept])]
        assert len(kept) == len(info) > 2
        for ours, theirs in zip(kept, order, strict=True):
            assert found.label[image, ours] == info[theirs]["label_id"]
            np.testing.assert_allclose(
                found.score[image, ours], info[theirs]["score"], atol=2e-6
            )
            packed = found.masks[image, found.query[image, ours]]
            assert np.array_equal(unpack_mask(packed, size), maps[theirs])
            y, x = np.nonzero(maps[theirs])
            box = [x.min(), y.min(), x.max() + 1, y.max() + 1]
            assert found.box[image, ours].tolist() == box
