"""LoRA files as other writers leave them: the right strength, or one line."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import lora_files, lora_reading

RANK, MODULES = 4, ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"]


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
        pattern.format(module=module, letter=letter, word=words[letter]): value
        for module, parts in factors().items()
        for letter, value in parts.items()
    }
    return tensors | {name: np.asarray(value) for name, value in more.items()}


def alphas(*values):
    names = [f"transformer.{module}.alpha" for module in MODULES]
    return {n: np.float32([v]) for n, v in zip(names, values, strict=False)}


def check_strength(adapter, *strengths):
    """By hand: the change of every layer is B A alpha / rank."""
    for (module, parts), strength in zip(factors().items(), strengths, strict=True):
        a, b = (adapter.weights[f"{module}.lora_{letter}.weight"] for letter in "AB")
        wanted = strength * parts["B"] @ parts["A"]
        np.testing.assert_allclose(b @ a * adapter.alpha / adapter.rank, wanted, 1e-5)


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
    ],
)
def test_names_of_other_writers(tmp_path, capsys, pattern):
    """Oracle: diffusers' rule where no alpha is told: the rank; and that is said."""
    save_file(named(pattern), tmp_path / "lora.safetensors")
    for given in (tmp_path, tmp_path / "lora.safetensors"):
        check_strength(lora_reading.read(given), 1, 1)
        assert "tells no alpha: taken for the rank, 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "told, strengths, alpha",
    [((2, 2), (0.5, 0.5), 2), ((2, 8), (0.5, 2), RANK), ((4, 4), (1, 1), 4)],
)
def test_alpha_of_a_module(tmp_path, capsys, told, strengths, alpha):
    """By hand: alpha / rank; one for all stays alpha, several go into B."""
    save_file(named(**alphas(*told)), tmp_path / lora_files.DIFFUSERS_FILE)
    adapter = lora_reading.read(tmp_path)
    assert adapter.alpha == alpha and not capsys.readouterr().out
    check_strength(adapter, *strengths)


@pytest.mark.parametrize(
    "config, alpha",
    [
        ({"lora_alpha": 3}, 3),
        ({"lora_alpha": 2.5, "rank_pattern": {}, "fan_in_fan_out": True}, 2.5),
        ({}, 8),  # PEFT's own default
        ({"task_type": None, "kasa_config": None, "inference_mode": True}, 8),
    ],
)
def test_alpha_of_peft(tmp_path, config, alpha):
    """Oracle: LoraConfig's defaults; the file itself is as good as its folder."""
    weights = named("base_model.model.{module}.lora_{letter}.weight")
    save_file(weights, tmp_path / lora_files.PEFT_FILE)
    path = tmp_path / lora_files.PEFT_CONFIG
    path.write_text(json.dumps({"peft_type": "LORA", "r": RANK} | config))
    for given in (tmp_path, tmp_path / lora_files.PEFT_FILE):
        adapter = lora_reading.read(given)
        assert adapter.alpha == alpha
        check_strength(adapter, alpha / RANK, alpha / RANK)


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
        ('{"r": 4, "use_rslora": true}', "use_rslora: true"),
        ('{"r": 4, "use_dora": true}', "use_dora: true"),
        ('{"r": 4, "rank_pattern": {"to_q": 8}}', "rank_pattern"),
        ('{"r": 4, "alpha_pattern": {"to_q": 8}}', "alpha_pattern"),
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
        lora_reading.read(tmp_path)
    line = str(caught.value)
    assert message.split(":")[0] in line and "\n" not in line and len(line) < 400


@pytest.mark.parametrize(
    "more, message",
    [
        (
            {"text_encoder.text_model.encoder.layers.0.q_proj.lora_A.weight": [[1.0]]},
            "text_encoder.text_model.* a text encoder too, which is not supported",
        ),
        ({"text_encoder_2.x.lora_B.weight": [[1.0]]}, "a text encoder too"),
        ({"lora_te1_x.lora_down.weight": [[1.0]]}, "a text encoder too"),
        ({"lora_unet_joint_blocks_0_x.lora_up.weight": [[1.0]]}, "kohya's layout"),
        ({"diffusion_model.joint_blocks.0.x.lora_A.weight": [[1.0]]}, "ComfyUI's"),
        ({"unet.down_blocks.0.x.lora_A.weight": [[1.0]]}, "of a UNet"),
        ({"transformer.a.lora_magnitude_vector": [1.0]}, "is no lora_A, .*no DoRA"),
        ({"transformer.a.dora_scale": [1.0]}, "is no lora_A"),
        ({"transformer.a.hada_w1_a": [[1.0]]}, "is no lora_A"),
        ({"transformer.a.lora_B.bias": [1.0]}, "is no lora_A"),
        ({"transformer.proj_out.weight": [[1.0]]}, "proj_out.weight: is no lora_A"),
        ({"transformer.a.lora_A.weight": [[1.0]]}, "a.lora_B.weight: missing"),
        (
            {"a.lora_A.weight": [[1.0]] * 2, "a.lora_B.weight": [[1.0] * 2]},
            "to_k: rank 4: must be 2, as of a: adapters of sev",
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
        lora_reading.read(path)


def test_two_alphas_must_agree(tmp_path):
    """Oracle: the contract; neither wins in silence."""
    told = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 2})
    path = tmp_path / "lora.safetensors"
    save_file(named(**alphas(2, 2)), path, {lora_reading.METADATA: told})
    check_strength(lora_reading.read(path), 0.5, 0.5)
    save_file(named(**alphas(2, 3)), path, {lora_reading.METADATA: told})
    with pytest.raises(UserError, match="alpha: 3: the configuration says 2: which"):
        lora_reading.read(path)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_types_become_fp32(tmp_path, dtype):
    """Oracle: numpy's casts."""
    given = {name: value.astype(dtype) for name, value in named().items()}
    save_file(given, tmp_path / "lora.safetensors")
    found = lora_reading.read(tmp_path).weights
    for name, value in given.items():
        ours = found[name.removeprefix("transformer.")]
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, value.astype(np.float32))


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
        lora_reading.read(tmp_path)


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
    place = whole.index(b"5.0")
    for at in (place, len(whole) - 3):
        spoilt = bytearray(whole)
        spoilt[at] ^= 1
        path.write_bytes(spoilt)
        with pytest.raises(UserError, match="damaged: .*checksum"):
            lora_reading.read(path)
