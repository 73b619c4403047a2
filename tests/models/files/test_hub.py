"""From a model's name to its folder; the hub itself is never asked."""

import huggingface_hub
import pytest
from huggingface_hub import errors

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import hub
from flowgrpo_jax.models.sd3.presets import HUB_IDS


@pytest.fixture
def asked(monkeypatch):
    """What snapshot_download is called with; it returns or raises `answer`."""
    calls = {"answer": "somewhere"}

    def snapshot_download(name, **options):
        calls.update(options, name=name)
        if isinstance(calls["answer"], BaseException):
            raise calls["answer"]
        return calls["answer"]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def http_error(kind):
    """An error of huggingface_hub as its own code would raise it."""
    error = kind.__new__(kind)
    Exception.__init__(error, "503 Server Error\nRequest ID: 1")
    return error


@pytest.mark.parametrize("alias, name", HUB_IDS.items())
def test_an_alias_stands_for_its_hub_id(asked, alias, name):
    """Oracle: the table."""
    assert str(hub.folder(alias, HUB_IDS)) == "somewhere" and asked["name"] == name


def test_only_what_is_read_is_downloaded(asked):
    """Oracle: huggingface_hub's own filter on the files of the repositories."""
    hub.folder("stabilityai/stable-diffusion-3.5-medium", {})
    held = [
        "model_index.json",
        "sd3.5_medium.safetensors",
        "text_encoders/t5xxl_fp8_e4m3fn.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_3/model-00001-of-00002.safetensors",
        "text_encoder_3/model.safetensors.index.json",
        "text_encoder_3/model.safetensors.index.fp16.json",
        "tokenizer_3/spiece.model",
        "tokenizer/merges.txt",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
    ]
    kept = huggingface_hub.utils.filter_repo_objects(
        held,
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert set(held) - set(kept) == {
        "sd3.5_medium.safetensors",
        "text_encoders/t5xxl_fp8_e4m3fn.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder_3/model.safetensors.index.fp16.json",
    }


def test_a_transformer_from_elsewhere_is_not_downloaded_too(asked):
    """Oracle: huggingface_hub's own filter; its configuration is read all the same."""
    held = ["config.json", "a-00001-of-00002.safetensors", "a.safetensors.index.json"]
    held = [f"transformer/{name}" for name in held] + ["vae/model.safetensors"]
    hub.folder("a/b", {}, transformer=False)
    kept = huggingface_hub.utils.filter_repo_objects(
        held, allow_patterns=asked["allow_patterns"]
    )
    assert set(held) - set(kept) == {"transformer/a-00001-of-00002.safetensors"}


@pytest.mark.parametrize(
    "kind, line",
    [
        (errors.GatedRepoError, "gated: click .* on https://huggingface.co/a/b, then"),
        (errors.RepositoryNotFoundError, "the hub has no a/b: check the spelling"),
        (
            errors.LocalEntryNotFoundError,
            "a/b is not downloaded.* unset HF_HUB_OFFLINE",
        ),
        (errors.OfflineModeIsEnabled, "a/b is not downloaded.* or give a folder"),
        (errors.HFValidationError, "is no hub id"),
        (errors.HfHubHTTPError, "download failed: 503 Server Error$"),
        (OSError, "download failed: 503 Server Error$"),
    ],
)
def test_what_the_hub_answers_is_one_line(asked, kind, line):
    """Oracle: the line, by hand."""
    asked["answer"] = http_error(kind)
    with pytest.raises(UserError, match=f"^model: a/b: {line}"):
        hub.folder("a/b", {})


def test_folders(tmp_path):
    """Oracle: the lines, by hand; a folder is taken as it is."""
    with pytest.raises(UserError, match="a folder without model_index.json"):
        hub.folder(str(tmp_path), {})
    (tmp_path / "model_index.json").write_text("{}")
    assert hub.folder(str(tmp_path), {}) == tmp_path
    (tmp_path / "flux1-dev.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        UserError, match="in one file: give it as transformer_path, and"
    ):
        hub.folder(str(tmp_path / "flux1-dev.gguf"), {})
    for name in ("sd4", str(tmp_path / "gone"), "./a/b", "a/"):
        with pytest.raises(
            UserError, match="no such folder: must be sprites, words, a"
        ):
            hub.folder(name, HUB_IDS)
