"""LoRA files as other writers leave them: the right strength, or one line."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import lora_files, lora_reading
from flowgrpo_jax.models.files.lora_names import LayerNames
from flowgrpo_jax.models.files.original_names import OriginalNames

RANK, MODULES = 4, ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"]
# Another name for both of them together, as fused layers have it.
NAMES = LayerNames(
    dict.fromkeys(MODULES, (8, 6)), OriginalNames({"blocks.0.attn.qk": tuple(MODULES)})
)


def read(path):
    return lora_reading.read(path, NAMES)


def factors(rank=RANK):
    rng = np.random.default_rng(0)
    return {
        module: {
            "A": rng.standard_normal((rank, 6)).astype(np.float32),
            "B": rng.standard_normal((8, rank)).astype(np.float32),
        }
        for module in MODULES
    }


def named(pattern="transformer.{module}.lora_{letter}.weight", **more):
    """The tensors of a file, under names of this pattern."""
    words = {"A": "down", "B": "up"}
    tensors = {
        pattern.format(
            module=module,
            joined=module.replace(".", "_"),
            letter=letter,
            word=words[letter],
        ): value
        for module, parts in factors().items()
        for letter, value in parts.items()
    }
    return tensors | {name: np.asarray(value) for name, value in more.items()}


def alphas(*values):
    names = [f"transformer.{module}.alpha" for module in MODULES]
    return {n: np.float32([v]) for n, v in zip(names, values, strict=False)}


def check_strength(layers, *strengths):
    """By hand: the change of every layer is B A alpha / rank."""
    assert layers.keys() == set(MODULES)
    for (module, parts), strength in zip(factors().items(), strengths, strict=True):
        found = layers[module].strength * layers[module].b @ layers[module].a
        np.testing.assert_allclose(found, strength * parts["B"] @ parts["A"], 1e-5)


@pytest.mark.parametrize(
    "pattern",
    [
        "transformer.{module}.lora_{letter}.weight",
        "transformer.{module}.lora_{letter}.default.weight",
        "transformer.{module}.lora_{letter}.my-adapter_0.weight",
        "transformer.base_model.model.{module}.lora_{letter}.weight",
        "base_model.model.{module}.lora_{letter}.default.weight",
        "base_model.model._orig_mod.{module}.lora_{letter}.weight",
        "{module}.lora_{letter}.weight",
        "transformer.{module}.lora_{word}.weight",
        "transformer.{module}.lora.{word}.weight",
        "diffusion_model.{module}.lora_{letter}.weight",
        "model.diffusion_model.{module}.lora_{word}.weight",
        "lora_unet_{joined}.lora_{word}.weight",
        "lora_transformer_{joined}.lora_{word}.weight",
        "lycoris_{joined}.lora_{word}.weight",
    ],
)
def test_names_of_other_writers(tmp_path, capsys, pattern):
    """Oracle: diffusers' rule where no alpha is told: the rank; and that is said."""
    save_file(named(pattern), tmp_path / "lora.safetensors")
    for given in (tmp_path, tmp_path / "lora.safetensors"):
        check_strength(read(given), 1, 1)
        assert "tells no alpha: taken for the rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    "told, strengths", [((2, 2), (0.5, 0.5)), ((2, 8), (0.5, 2)), ((4, 4), (1, 1))]
)
def test_alpha_of_a_module(tmp_path, capsys, told, strengths):
    """By hand: alpha / rank; each layer has its own."""
    save_file(named(**alphas(*told)), tmp_path / lora_files.DIFFUSERS_FILE)
    check_strength(read(tmp_path), *strengths)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "config, strengths",
    [
        ({"lora_alpha": 3}, (0.75, 0.75)),
        ({"lora_alpha": 2, "rank_pattern": {}, "fan_in_fan_out": True}, (0.5, 0.5)),
        ({}, (2, 2)),  # PEFT's own default is 8
        ({"task_type": None, "kasa_config": None, "inference_mode": True}, (2, 2)),
        ({"lora_alpha": 3, "use_rslora": True}, (1.5, 1.5)),  # alpha / sqrt(rank)
        ({"alpha_pattern": {"to_k": 2}}, (2, 0.5)),
        ({"alpha_pattern": {"attn": 2, r".*\.to_(q|v)": 1, "o_q": 3}}, (0.25, 2)),
        ({"alpha_pattern": {"^transformer_blocks.0.attn.to_q": 1}}, (0.25, 2)),
        ({"r": 9, "rank_pattern": {"attn.to_q": 4, "to_k": 4}}, (2, 2)),
        ({"r": 9, "rank_pattern": {r"to_[qk]": 4}, "use_rslora": True}, (4, 4)),
    ],
)
def test_alpha_of_peft(tmp_path, config, strengths):
    """Oracle: PEFT's formulas; the file itself is as good as its folder."""
    weights = named("base_model.model.{module}.lora_{letter}.weight")
    save_file(weights, tmp_path / lora_files.PEFT_FILE)
    path = tmp_path / lora_files.PEFT_CONFIG
    path.write_text(json.dumps({"peft_type": "LORA", "r": RANK} | config))
    for given in (tmp_path, tmp_path / lora_files.PEFT_FILE):
        check_strength(read(given), *strengths)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_the_header_of_a_pipeline_and_of_its_transformer(tmp_path, prefix):
    """Oracle: diffusers' save_lora_weights and save_lora_adapter; by hand."""
    told = {"r": RANK, "lora_alpha": 2, "target_modules": ["to_q"], "use_rslora": True}
    header = json.dumps({f"{prefix}{key}": value for key, value in told.items()})
    path = tmp_path / "lora.safetensors"
    save_file(named(), path, {lora_reading.METADATA: header})
    check_strength(read(path), 1, 1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is not JSON"),
        ('{"r": 4, "lora_al', "is not JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "tells nothing"),
        ('{"r": 4, "lora_alpha": null}', "lora_alpha: null: must be of the type float"),
        ('{"r": 4, "lora_alpha": "8"}', 'lora_alpha: "8": must be of the type float'),
        ('{"r": 4, "lora_alpha": true}', "lora_alpha: true: must be"),
        ('{"r": 4, "lora_alpha": NaN}', "lora_alpha: NaN: must be"),
        ('{"r": 4, "lora_alpha": 0}', "lora_alpha: 0: must be above 0"),
        ('{"r": 4, "lora_alpha": -8}', "lora_alpha: -8: must be above 0"),
        ('{"lora_alpha": 8}', "r: 8: the weights are of rank 4"),
        ('{"r": 16, "lora_alpha": 8}', "r: 16: the weights are of rank 4"),
        ('{"r": 4, "use_dora": true}', "use_dora: true"),
        ('{"r": 4, "rank_pattern": {"to_q": 8}}', "r: 8: the weights are of rank 4"),
        ('{"r": 4, "alpha_pattern": {"to_q": 0}}', "alpha_pattern: to_q: 0"),
        ('{"r": 4, "alpha_pattern": {"to_q": "8"}}', "alpha_pattern: to_q"),
        ('{"r": 4, "alpha_pattern": ["to_q"]}', "alpha_pattern: must be an object"),
        ('{"r": 4, "alpha_pattern": {"to(q": 8}}', "is no regular expression"),
        ('{"r": 4, "alpha_pattern": {"(a*)*q": 8}}', "more than two repetitions"),
        ('{"r": 4, "alpha_pattern": {"a*.*.*q": 8}}', "more than two repetitions"),
        ('{"r": 4, "bias": "all"}', 'bias: "all"'),
        ('{"r": 4, "lora_bias": true}', "lora_bias: true"),
        ('{"r": 4, "modules_to_save": ["proj_out"]}', "modules_to_save"),
        ('{"r": 4, "init_lora_weights": "pissa"}', "init_lora_weights"),
        ('{"r": 4, "use_qalora": true}', "use_qalora: true: not followed"),
        ('{"r": 4, "some_new_scaling": 2}', "some_new_scaling: 2: not followed"),
        ('{"peft_type": "LOHA"}', 'peft_type: "LOHA"'),
        ("version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    ],
)
@pytest.mark.parametrize("place", ["peft", "header"])
def test_what_a_configuration_cannot_say(tmp_path, text, message, place):
    """Oracle: the line, by hand: file and key; of diffusers' header as of PEFT's file."""
    if place == "peft":
        save_file(named(), tmp_path / lora_files.PEFT_FILE)
        path = tmp_path / lora_files.PEFT_CONFIG
        path.write_text(text)
    else:
        path, told = tmp_path / lora_files.DIFFUSERS_FILE, text
        if text.startswith("{") and text.endswith("}"):
            told = text.replace('{"', '{"transformer.', 1).replace(
                ', "', ', "transformer.'
            )
        if "git-lfs" in text:
            message = "is not JSON"
        save_file(named(), path, {lora_reading.METADATA: told})
    with pytest.raises(UserError, match=f"^train.lora_path: {path}: .*") as caught:
        read(tmp_path)
    line = str(caught.value)
    assert message.split(":")[0] in line and "\n" not in line and len(line) < 400


@pytest.mark.parametrize(
    "more, message",
    [
        (
            {"lora_unet_joint_blocks_0_x.lora_up.weight": [[1.0]]},
            "lora_unet_joint_blocks_0_x.lora_A.weight: missing",
        ),
        ({"transformer.a.lora_magnitude_vector": [1.0]}, "is no lora_A, .*no DoRA"),
        ({"transformer.a.dora_scale": [1.0]}, "is no lora_A"),
        ({"transformer.a.hada_w1_a": [[1.0]]}, "is no lora_A"),
        ({"transformer.a.lora_B.bias": [1.0]}, "is no lora_A"),
        ({"transformer.proj_out.weight": [[1.0]]}, "proj_out.weight: is no lora_A"),
        ({"transformer.a.lora_A.weight": [[1.0]]}, "a.lora_B.weight: missing"),
        (
            {"a.lora_A.weight": [[1.0]] * 2, "a.lora_B.weight": [[1.0] * 2]},
            "a: this transformer has no linear layer of that name: .*another model",
        ),
        (
            {
                "lora_unet_a.lora_down.weight": [[1.0]] * 2,
                "lora_unet_a.lora_up.weight": [[1.0] * 2],
            },
            "lora_unet_a: this transformer has no linear layer of that name",
        ),
        (
            {"a.lora_A.weight": [[1.0]] * 4, "a.lora_B.weight": [[1.0] * 3]},
            "a: lora_A has rank 4, lora_B 3",
        ),
        ({"a.lora_A.weight": [[[1.0]]], "a.lora_B.weight": [[1.0]]}, "be matrices"),
        ({"a.lora_A.weight": [[np.nan]]}, "a.lora_A.weight: .* not finite"),
        ({"transformer.b.lora_A.other.weight": [[1.0]]}, "several adapters"),
        ({f"{MODULES[0]}.lora_A.weight": [[1.0]]}, "stands there under two names"),
        (alphas(3), "to_k: has no alpha"),
        ({"transformer.c.alpha": [3.0]} | alphas(1, 1), "c: has no alpha, or nothing"),
        (alphas(0, 0), "alpha: 0: must be above 0"),
        (alphas(-1, -1), "alpha: -1: must be above 0"),
        (alphas(np.inf, 1), "not finite"),
    ],
)
def test_what_is_no_plain_lora_is_named(tmp_path, more, message):
    """Oracle: the line, by hand; never a part left out in silence."""
    path = tmp_path / "lora.safetensors"
    save_file(named(**{k: np.float32(v) for k, v in more.items()}), path)
    with pytest.raises(UserError, match=f"^train.lora_path: {path}: .*{message}"):
        read(path)


def test_two_alphas_must_agree(tmp_path):
    """Oracle: the contract; neither wins in silence."""
    told = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 2})
    path = tmp_path / "lora.safetensors"
    save_file(named(**alphas(2, 2)), path, {lora_reading.METADATA: told})
    check_strength(read(path), 0.5, 0.5)
    save_file(named(**alphas(2, 3)), path, {lora_reading.METADATA: told})
    with pytest.raises(UserError, match="alpha: 3: the configuration says 2: which"):
        read(path)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_types_become_fp32(tmp_path, dtype):
    """Oracle: numpy's casts."""
    given = {name: value.astype(dtype) for name, value in named().items()}
    save_file(given, tmp_path / "lora.safetensors")
    found = read(tmp_path)
    for module in MODULES:
        for letter, ours in zip("AB", found[module], strict=False):
            theirs = given[f"transformer.{module}.lora_{letter}.weight"]
            assert ours.dtype == np.float32
            np.testing.assert_array_equal(ours, theirs.astype(np.float32))


@pytest.mark.parametrize(
    "files, message",
    [
        ([], "holds no .safetensors file: give a"),
        (
            ["a.safetensors", "b.safetensors"],
            "holds a.safetensors, b.safetensors: give",
        ),
        (["adapter_model.safetensors"], "adapter_config.json must lie beside it"),
        (["adapter_config.json", "adapter_model.bin"], "no adapter_model.safetensors"),
        (["pytorch_lora_weights.bin"], "holds no .safetensors file"),
        (["a.safetensors"], "not a readable safetensors file"),
    ],
)
def test_folders_without_an_adapter(tmp_path, files, message):
    """Oracle: the line, by hand; it names the key and the folder or file."""
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"^train.lora_path: .*{tmp_path}.*{message}"):
        read(tmp_path)


def test_a_flipped_bit_of_ours(tmp_path):
    """Oracle: the checksum, which covers alpha in the header as well."""
    adapter = lora_files.Adapter(
        {
            f"{module}.lora_{letter}.weight": value
            for module, parts in factors().items()
            for letter, value in parts.items()
        },
        5.0,
    )
    path = lora_files.write_diffusers(tmp_path, adapter)
    whole = path.read_bytes()
    place = whole.index(b"4.0")
    for at in (place, len(whole) - 3):
        spoilt = bytearray(whole)
        spoilt[at] ^= 1
        path.write_bytes(spoilt)
        with pytest.raises(UserError, match="damaged: .*checksum"):
            read(path)
