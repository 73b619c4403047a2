"""Mask2Former against transformers (torch, CPU, fp32): network and post-processing."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax.data.geneval_grammar import COCO80
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.mask2former import network
from flowgrpo_jax.models.mask2former.config import Mask2FormerConfig
from flowgrpo_jax.models.mask2former.instances import find_instances, unpack_mask
from flowgrpo_jax.rewards.mask2former import Mask2FormerDetector, Processor
from tests.parity.oracle import assert_close

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PARTS = ("backbone", "pixels")
LABELS = {i: f"thing {i}" for i in range(80)}


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
        decoder_layers=4,
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
def folder(tmp_path_factory):
    """A transformers folder with network and processor."""
    folder = tmp_path_factory.mktemp("mask2former")
    reference_model().save_pretrained(folder)
    processor = transformers.Mask2FormerImageProcessorPil(
        size={"height": 64, "width": 96}
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(folder):
    """(their model, our config, our parameters)"""
    theirs = reference_model()
    config = Mask2FormerConfig.from_folder(folder)
    return theirs, config, network.load(folder, config)


@pytest.fixture(scope="module")
def outputs(pair):
    """Theirs, ours and our parts', of images whose sides are multiples of nothing."""
    theirs, config, params = pair
    pixels = np.random.default_rng(0).normal(size=(2, 70, 58, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs(channels_first(pixels), output_hidden_states=True)

    @jax.jit
    def run(params, pixels):
        return network.Mask2Former(config).apply(
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
    params = network.load(tmp_path, Mask2FormerConfig.from_folder(tmp_path))
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
    segmentation = network.Segmentation(
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


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((96, 96), {"size": {"height": 384, "width": 384}}),
        (
            (70, 100),
            {"size": {"shortest_edge": 80, "longest_edge": 133}, "size_divisor": 16},
        ),
        (
            (190, 64),
            {"size": {"shortest_edge": 80, "longest_edge": 100}, "resample": 3},
        ),
    ],
)
def test_processor(tmp_path, size, options):
    """Resizing to 1/255 of what PIL makes, and the normalisation."""
    theirs = transformers.Mask2FormerImageProcessorPil(**options)
    theirs.save_pretrained(tmp_path)
    ours = Processor.from_folder(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    wanted = theirs(list(images), return_tensors="np")["pixel_values"]
    found = ours(jnp.asarray(images / 255, jnp.float32))
    step = 1.01 / 255 / min(ours.std)
    np.testing.assert_allclose(np.moveaxis(found, -1, 1), wanted, atol=step)


def test_detector(folder):
    """Image to boxes and names; the oracle is their processor, network and rules."""
    draw = np.random.default_rng(2)
    small = draw.uniform(size=(3, 5, 5, 3))
    images = np.repeat(np.repeat(small, 16, axis=1), 20, axis=2).astype(np.float32)
    threshold = 0.02
    found = Mask2FormerDetector(str(folder), microbatch=1, threshold=threshold)(images)

    processor = transformers.Mask2FormerImageProcessorPil.from_pretrained(folder)
    inputs = processor(
        list(np.rint(images * 255).astype(np.uint8)), return_tensors="pt"
    )
    with torch.no_grad():
        outputs = reference_model()(**inputs)
    wanted = processor.post_process_instance_segmentation(
        outputs, threshold, target_sizes=[(80, 100)] * 3, return_binary_maps=True
    )
    assert sum(map(len, found)) > 5
    for ours, theirs in zip(found, wanted, strict=True):
        info = theirs["segments_info"]
        order = sorted(range(len(info)), key=lambda i: -info[i]["score"])
        names = [COCO80[info[i]["label_id"]] for i in order]
        assert [one.class_name for one in ours] == names
        for one, i in zip(ours, order, strict=True):
            mask = theirs["segmentation"][i].numpy() > 0
            assert abs(one.score - info[i]["score"]) < 1e-3
            # A pixel at the mask's very edge may fall to either side.
            assert (one.mask != mask).mean() < 5e-3
            y, x = np.nonzero(mask)
            edges = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
            assert np.abs(np.array(one.box) - edges).max() <= 1
