"""The seam of model families: how one is found, and that nothing else names one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax import config as configs
from flowgrpo_jax.config import checks, families, recipes
from flowgrpo_jax.models.denoiser import Denoiser
from flowgrpo_jax.models.family import Code
from tests import toy
from tests.tiny import tiny_model

PACKAGE = Path(families.__file__).parents[1]
ROWS = {one.name: one for one in families.FAMILIES}


@pytest.mark.parametrize(
    "model, name",
    [
        ("sprites", "embedded"),
        ("words", "embedded"),
        ("my/run/weights.safetensors", "embedded"),
        ("sd3.5-medium", "sd3"),
        ("stabilityai/stable-diffusion-3.5-large", "sd3"),
        ("somebody/else", "sd3"),
    ],
)
def test_the_family_of_a_name(model, name):
    """Oracle: by hand; a hub id that is not known is taken for the first family."""
    assert families.of(model) is ROWS[name]


def test_a_folder_tells_its_family(tmp_path, monkeypatch):
    """Oracle: a second family in the table; the class of the transformer decides."""
    other = families.Family("other", "nowhere", class_names=("OtherTransformer",))
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, other))
    (tmp_path / "transformer").mkdir()
    held = tmp_path / "transformer" / "config.json"
    for text, family in (
        (json.dumps({"_class_name": "OtherTransformer"}), other),
        (json.dumps({"_class_name": "SD3Transformer2DModel"}), ROWS["sd3"]),
        ("[1]", ROWS["sd3"]),
        ("{", ROWS["sd3"]),
    ):
        held.write_text(text)
        assert families.of(str(tmp_path)) is family


@pytest.mark.parametrize("row", families.FAMILIES, ids=lambda row: row.name)
def test_every_row_has_its_code(row):
    """Oracle: the protocol; and its config keys are keys."""
    assert isinstance(row.code, Code)
    config = configs.make()
    for key in (*row.defaults, *row.sampling):
        configs.get(config, key)


@pytest.mark.parametrize(
    "network", [toy.MODEL.denoiser, tiny_model()[0].denoiser], ids=["toy", "tiny"]
)
def test_networks_follow_the_protocol(network):
    """Oracle: the protocol; two numbers and a transformer are asked alike."""
    assert isinstance(network, Denoiser)
    assert hash(network) == hash(network.with_options(lora_rank=0))
    shape = toy.MODEL.latent_shape if network is toy.MODEL.denoiser else (24, 24, 3)
    collections = network.init(jax.random.key(0), shape)
    context, pooled = network.text_features
    text = toy.TextEmbedding(jnp.ones((2, 3, context)), jnp.ones((2, pooled)))
    latents = jnp.ones((2, *shape))
    answer = network.predict(collections, latents, jnp.full(2, 0.5), text)
    assert answer.shape == latents.shape and np.isfinite(answer).all()
    assert network.tokens(shape) >= 1 and network.kept_bytes(4) > 0
    assert network.cost(4, 3).total > 0


def test_a_recipe_without_values_for_a_family_says_so():
    """Oracle: the table of recipes; an embedded model takes a recipe as it is."""
    for name, row in recipes.RECIPES.items():
        if row.authors:
            told = checks.remarks(configs.make(f"model=sd3.5-medium,recipe={name}"))
            about = [line for line in told if line.startswith(f"recipe: {name}: ")]
            assert len(about) == ("sd3.5-medium" not in row.authors), name
        assert not any(
            line.startswith("recipe: ")
            for line in checks.remarks(configs.make(f"model=sprites,recipe={name}"))
        )


def test_each_family_takes_its_own_values():
    """Oracle: the table; where authors trained two families, neither gets the other's."""
    row = recipes.RECIPES["flow_grpo"]
    config = configs.make("model=sd3.5-medium,recipe=flow_grpo")
    for key, value in row.authors["sd3.5-medium"].items():
        assert configs.get(config, key) == value
    assert config.sample.noise_level != row.authors["flux.1-dev"]["sample.noise_level"]


def test_no_line_outside_of_models_names_a_family():
    """Oracle: the text of the package.

    The one table that may is that of recipes: its rows say which released models a
    paper's authors trained, and with what.
    """
    named = re.compile(r"sd_?3|mmdit|flux|stable.?diffusion", re.IGNORECASE)
    allowed = {PACKAGE / "config" / "recipes.py"}
    found = [
        f"{path.relative_to(PACKAGE)}:{number}"
        for path in PACKAGE.rglob("*.py")
        if path not in allowed and PACKAGE / "models" not in path.parents
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if named.search(line)
    ]
    assert not found


def test_a_config_needs_no_networks():
    """Oracle: the modules of a process that has made one."""
    code = (
        "import sys; from flowgrpo_jax import config\n"
        "config.make('model=sd3.5-medium,recipe=g2rpo')\n"
        "print([name for name in ('jax', 'flax') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
