"""Scores of the CLIP family against torch, random weights, from images and texts.

The oracle preprocesses with transformers' CLIPImageProcessor on PIL, embeds with its
CLIPModel, and follows the definition of each score.
"""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.encoders import clip_weights
from flowgrpo_jax.models.files import tensors
from flowgrpo_jax.rewards import linear_head, monitors, registry
from tests.parity.oracle import assert_close
from tests.parity.tiny_sd3 import clip_tokenizer, randomize

BAR = 1e-3
SIDE = 28
TEXTS = ["a photo of the red circle", "green square", "", "a sign that reads hello"]
PROMPTS = [Prompt(text) for text in TEXTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIPModel with tokenizer and processor, as save_pretrained writes them."""
    path, tokenizer = tmp_path_factory.mktemp("clip"), clip_tokenizer("!")
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        hidden_act="gelu",
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=7,
        hidden_act="gelu",
    )
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=20
    )
    randomize(transformers.CLIPModel(config)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessorPil(size=SIDE, crop_size=SIDE).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.CLIPModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def images():
    """Four images of 8-bit values, wider than high."""
    values = np.random.default_rng(0).integers(0, 256, (4, 40, 56, 3))
    return (values / 255).astype(np.float32)


def as_pil(images):
    return [Image.fromarray(np.uint8(np.round(image * 255))) for image in images]


def embedded(model, folder, pictures):
    """Unit image vectors of PIL pictures."""
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        vectors = model.visual_projection(model.vision_model(pixels).pooler_output)
    return vectors / vectors.norm(dim=-1, keepdim=True)


def cosines(model, folder, pictures):
    """Of each picture with its text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt", truncation=True)
    with torch.no_grad():
        vectors = model.text_projection(model.text_model(**tokens).pooler_output)
    vectors = vectors / vectors.norm(dim=-1, keepdim=True)
    return (embedded(model, folder, pictures) * vectors).sum(-1)


def make(name, **options):
    return registry.make(name, registry.Context(options={name: options}))


@pytest.mark.parametrize("name, scale", [("clipscore", 30), ("pickscore", 26)])
def test_logits(name, scale, folder, theirs, images):
    """Through a microbatch that does not divide the images."""
    options = {"weights": str(folder), "processor": str(folder), "microbatch": 3}
    scores = make(name, **options)(images, PROMPTS)[name]
    cosine = cosines(theirs, folder, as_pil(images))
    assert_close(scores, theirs.logit_scale.exp() * cosine / scale, BAR)


def test_diversity_within_a_prompt(folder, theirs, images):
    """The monitor: mean cosine distance of the pairs of a prompt, then over prompts."""
    options = {"clip_diversity": {"weights": str(folder), "microbatch": 3}}
    context = registry.Context(options=options)
    measure = monitors.make(["clip_diversity"], {}, context)
    found = measure(images, PROMPTS, np.array([0, 0, 0, 1]))["clip_diversity"]
    vectors = embedded(theirs, folder, as_pil(images[:3])).numpy()
    pairs = [1 - vectors[a] @ vectors[b] for a, b in ((0, 1), (0, 2), (1, 2))]
    assert found == pytest.approx(np.mean(pairs), rel=BAR)


def test_differentiable_function_is_the_score(folder, images):
    scorer = make("clipscore", weights=str(folder))
    score = scorer.differentiable(PROMPTS)
    assert_close(jax.jit(score)(images), scorer(images, PROMPTS)["clipscore"], 1e-5)
    # Uphill along its gradient it rises.
    grey = jax.numpy.asarray(0.25 + 0.5 * images)
    slope = jax.jit(jax.grad(lambda x: score(x).sum()))(grey)
    step = 0.05 * slope / abs(slope).max()
    assert score(grey + step).sum() > score(grey).sum()


def open_clip_names(state):
    """transformers' tensors under open_clip's names (its model.py, transformer.py)."""
    out = {"logit_scale": state["logit_scale"]}
    out["text_projection"] = state["text_projection.weight"].T
    out["visual.proj"] = state["visual_projection.weight"].T
    around = {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": (
            "vision_model.embeddings.position_embedding.weight"
        ),
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    }
    for end in ("weight", "bias"):
        around[f"ln_final.{end}"] = f"text_model.final_layer_norm.{end}"
        around[f"visual.ln_pre.{end}"] = f"vision_model.pre_layrnorm.{end}"
        around[f"visual.ln_post.{end}"] = f"vision_model.post_layernorm.{end}"
        for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
            for layer in range(2):
                block = f"{prefix}transformer.resblocks.{layer}"
                old = f"{tower}.encoder.layers.{layer}"
                around[f"{block}.ln_1.{end}"] = f"{old}.layer_norm1.{end}"
                around[f"{block}.ln_2.{end}"] = f"{old}.layer_norm2.{end}"
                around[f"{block}.mlp.c_fc.{end}"] = f"{old}.mlp.fc1.{end}"
                around[f"{block}.mlp.c_proj.{end}"] = f"{old}.mlp.fc2.{end}"
                around[f"{block}.attn.out_proj.{end}"] = (
                    f"{old}.self_attn.out_proj.{end}"
                )
                out[f"{block}.attn.in_proj_{end}"] = torch.cat(
                    [state[f"{old}.self_attn.{part}_proj.{end}"] for part in "qkv"]
                )
    return {n: t.contiguous() for n, t in out.items()} | {
        ours: state[name] for ours, name in around.items()
    }


@pytest.fixture(scope="module")
def open_clip_folder(folder, tmp_path_factory):
    """The same weights as open_clip keeps them."""
    path = tmp_path_factory.mktemp("open_clip")
    state = load_file(folder / "model.safetensors")
    save_file(open_clip_names(state), path / "open_clip_model.safetensors")
    clip_tokenizer("!").save_pretrained(path)
    vocabulary = len(clip_tokenizer("!"))
    model = {
        "embed_dim": 20,
        "vision_cfg": {
            "image_size": SIDE,
            "layers": 2,
            "width": 32,
            "head_width": 16,
            "patch_size": 7,
            "mlp_ratio": 1.5,
        },
        "text_cfg": {
            "vocab_size": vocabulary,
            "width": 24,
            "heads": 2,
            "layers": 2,
        },
    }
    # open_clip's text MLP is four times the width; the tiny model's is twice.
    model["text_cfg"]["mlp_ratio"] = 2
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    return path


def test_hpsv2(open_clip_folder, folder, theirs, images):
    """Cosine; longer side to 28 pixels, black bars (HPSv2's image transform)."""
    file = open_clip_folder / "open_clip_model.safetensors"
    scorer = make("hpsv2", weights=str(file), processor=str(open_clip_folder))
    padded = []
    for picture in as_pil(images):
        square = Image.new("RGB", (SIDE, SIDE))
        square.paste(picture.resize((SIDE, 20), Image.Resampling.BICUBIC), (0, 4))
        padded.append(square)
    expected = cosines(theirs, folder, padded)
    assert_close(scorer(images, PROMPTS)["hpsv2"], expected, BAR)


def test_open_clip_files_go_round(open_clip_folder, tmp_path):
    _, params = clip_weights.read(open_clip_folder)
    copy = tmp_path / "copy.safetensors"
    tensors.write(copy, params, clip_weights.OPEN_CLIP_TABLE)
    wrote = load_file(copy)
    had = load_file(open_clip_folder / "open_clip_model.safetensors")
    assert wrote.keys() == had.keys()
    assert all(torch.equal(wrote[name], had[name]) for name in had)


class Head(torch.nn.Module):
    """LAION's aesthetic predictor: its MLP class, module for module."""

    def __init__(self, width):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(width, 1024),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(1024, 128),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(128, 64),
            torch.nn.Dropout(0.1),
            torch.nn.Linear(64, 16),
            torch.nn.Linear(16, 1),
        )

    def forward(self, vectors):
        return self.layers(vectors)[:, 0]


def test_aesthetic(folder, theirs, images, tmp_path):
    torch.manual_seed(1)
    head, file = randomize(Head(20)), tmp_path / "head.safetensors"
    save_file(head.state_dict(), file)
    scorer = make("aesthetic", weights=str(folder), head=str(file))
    with torch.no_grad():
        expected = head(embedded(theirs, folder, as_pil(images)))
    assert_close(scorer(images, PROMPTS)["aesthetic"], expected, BAR)
    assert linear_head.WIDTHS[-1] == 1


def test_image_similarity(folder, theirs, images, tmp_path):
    """References have sizes of their own."""
    references = as_pil(images[::-1, :30])
    prompts = []
    for number, picture in enumerate(references):
        picture.save(tmp_path / f"{number}.png")
        prompts.append(Prompt("", {"reference_image": str(tmp_path / f"{number}.png")}))
    scorer = make("image_similarity", weights=str(folder))
    ours = embedded(theirs, folder, as_pil(images))
    expected = (ours * embedded(theirs, folder, references)).sum(-1)
    assert_close(scorer(images, prompts)["image_similarity"], expected, BAR)
    with pytest.raises(UserError, match="reference_image"):
        scorer(images[:1], [Prompt("without")])


@pytest.mark.parametrize(
    "name, options, line",
    [
        ("hpsv2", {}, "hpsv2.weights: must be a .safetensors file"),
        ("aesthetic", {}, "aesthetic.head: must be a .safetensors file"),
        ("clipscore", {"weights": "nowhere"}, "clipscore.weights: nowhere: no such"),
        ("clipscore", {"dtype": "int8"}, "clipscore.dtype: int8"),
        ("clipscore", {"microbatch": 0}, "clipscore.microbatch: 0"),
    ],
)
def test_wrong_options_get_one_line(name, options, line, folder):
    options = {"weights": str(folder)} | options if name == "clipscore" else options
    with pytest.raises(UserError, match=line):
        make(name, **options)
