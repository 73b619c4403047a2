"""LoRA files and the headers of safetensors files.

Oracles: of a file's tensors the safetensors library itself, which must read the same
bytes from all that is accepted; of a LoRA the strength, alpha / rank or what a pattern
or rsLoRA make of it, that the file's own words give, worked out here beside the drawing
of the file.
"""

import contextlib
import io
import json
import math
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from hypothesis import strategies as st
from safetensors.numpy import save

from benchmarks.fuzz import core
from flowgrpo_jax.models.files import (
    lora_files,
    lora_reading,
    safetensors_files,
    weights,
)
from flowgrpo_jax.models.files.lora_names import LayerNames

MODULES = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_k", "x")
NAMES = LayerNames(dict.fromkeys(MODULES, (5, 3)))
PATTERNS = (
    "transformer.{module}.lora_{letter}.weight",
    "base_model.model.{module}.lora_{letter}.weight",
    "transformer.{module}.lora_{letter}.default.weight",
    "{module}.lora_{word}.weight",
    "transformer.{module}.lora.{word}.weight",
    "diffusion_model.{module}.lora_{letter}.weight",
    "lora_unet_{joined}.lora_{word}.weight",
    "text_encoder.{module}.lora_{letter}.weight",
)
# What changes strengths, and what is no plain LoRA: never to be accepted.
STRENGTH_KEYS: dict[str, Any] = {
    "use_rslora": True,
    "rank_pattern": {"to_q": 1},
    "alpha_pattern": {"to_q": 1},
}
OTHER_KEYS: dict[str, Any] = STRENGTH_KEYS | {
    "use_dora": True,
    "bias": "all",
    "lora_bias": True,
    "modules_to_save": ["x"],
    "init_lora_weights": "pissa",
    "peft_type": "LOHA",
    "a_new_scale": 2.0,
}
LEFT_OUT = "text_encoder.a.lora_A.weight"
OTHER_TENSORS = (
    *("a.dora_scale", "a.lora_magnitude_vector", "a.lora_B.bias", "a.diff"),
    *(LEFT_OUT, "a.alpha", "a.lora_A.weight", "a.hada_w1_a"),
)
SIZES = st.integers(0, 3) | st.sampled_from([-1, 7, 2**31, 2**63, 2.0, True, None, "2"])
WEIRD = (
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=4)
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "I64", "U8", "F8_E4M3", "F4"]),
        "shape": st.lists(SIZES, max_size=3),
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2),
    }
)
HEADERS = st.dictionaries(
    st.text(max_size=3) | st.just("__metadata__"),
    ENTRY | WEIRD | st.dictionaries(st.text(max_size=3), st.text(max_size=3)),
    max_size=4,
)


@st.composite
def _files(draw) -> dict[str, Any]:
    """Bytes of a file: tensors one after the other, and perhaps a fault or two."""
    header, place = {}, 0
    for name in draw(st.lists(st.text(max_size=4), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(["F32", "BF16", "F16", "I64", "U8", "BOOL"]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        width = {"F32": 4, "I64": 8, "U8": 1, "BOOL": 1}.get(dtype, 2)
        size = int(np.prod(shape)) * width
        offsets = [place, place + size]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        place += size
    if draw(st.booleans()):
        header |= draw(HEADERS)
    text = json.dumps(header).encode()
    length = len(text) + draw(st.sampled_from([0, 0, 0, 1, -1, 2**40]))
    data = bytes(max(0, place + draw(st.sampled_from([0, 0, 0, 1, -1, 8]))))
    whole = struct.pack("<Q", length) + text + data
    if draw(st.booleans()) and draw(st.booleans()):
        at = draw(st.integers(0, len(whole) - 1))
        whole = whole[:at] + bytes([draw(st.integers(0, 255))]) + whole[at + 1 :]
    return {"bytes": whole}


@st.composite
def _loras(draw) -> dict[str, Any]:
    """A LoRA by its parts, as `_write` makes a file of it."""
    modules = draw(st.lists(st.sampled_from(MODULES), min_size=1, unique=True))
    alpha = st.sampled_from([1.0, 2.0, 4, 8.0, 0.0, -1.0, "4", None, True])
    config = st.fixed_dictionaries(
        {}, optional={"r": st.sampled_from([1, 2, 4, 8, None]), "lora_alpha": alpha}
    )
    others = st.sampled_from(sorted(OTHER_KEYS)).map(lambda key: [key])
    return {
        "modules": modules,
        "pattern": draw(st.sampled_from(PATTERNS)),
        "rank": draw(st.sampled_from([1, 2, 4, 8])),
        "place": draw(st.sampled_from(["none", "header", "peft", "broken"])),
        "config": draw(config),
        "keys": draw(st.just([]) | others),
        "alphas": draw(
            st.just([])
            | st.lists(
                st.sampled_from([1.0, 2.0, 4.0, 0.0, float("nan")]),
                min_size=len(modules) - 1,
                max_size=len(modules),
            )
        ),
        "extra": draw(st.none() | st.sampled_from(OTHER_TENSORS)),
        "dropped": draw(st.sampled_from([False, False, False, True])),
    }


def _factors(rank: int, number: int) -> dict[str, np.ndarray]:
    """Whole numbers, so that a strength that is a power of two leaves them exact."""
    a = np.arange(rank * 3, dtype=np.float32).reshape(rank, 3) + number
    b = np.arange(5 * rank, dtype=np.float32).reshape(5, rank) - number
    return {"A": a, "B": b}


def _write(given: dict[str, Any], folder: Path) -> Path:
    words, tensors = {"A": "down", "B": "up"}, {}
    for number, module in enumerate(given["modules"]):
        for letter, value in _factors(given["rank"], number).items():
            name = given["pattern"].format(
                module=module,
                joined=module.replace(".", "_"),
                letter=letter,
                word=words[letter],
            )
            tensors[name] = value
    if given["dropped"]:
        tensors.popitem()
    for module, alpha in zip(given["modules"], given["alphas"], strict=False):
        begin = given["pattern"].partition(".lora")[0]
        name = begin.format(module=module, joined=module.replace(".", "_"))
        tensors[f"{name}.alpha"] = np.float32([alpha])
    if given["extra"]:
        tensors[given["extra"]] = np.float32([[1]])
    told = given["config"] | {key: OTHER_KEYS[key] for key in given["keys"]}
    header = None
    if given["place"] == "header":
        prefixed = {f"transformer.{key}": value for key, value in told.items()}
        header = {lora_reading.METADATA: json.dumps(prefixed)}
    peft = given["place"] in ("peft", "broken")
    if peft:
        text = json.dumps(told)
        text = text[: len(text) // 2] if given["place"] == "broken" else text
        (folder / lora_files.PEFT_CONFIG).write_text(text)
    path = folder / (lora_files.PEFT_FILE if peft else lora_files.DIFFUSERS_FILE)
    path.write_bytes(save(tensors, header))
    return path


def _strengths(given: dict[str, Any]) -> list[float] | None:
    """Of every module by the file's words; None where it must not be read."""
    told, rank, keys = (
        given["place"] in ("header", "peft"),
        given["rank"],
        given["keys"],
    )
    config = given["config"] if told else {"r": rank, "lora_alpha": rank}
    keys = keys if told else []
    other = given["extra"] not in (None, LEFT_OUT) or "text_encoder" in given["pattern"]
    if other or given["place"] == "broken" or given["dropped"]:
        return None
    if not config and not keys or set(keys) - STRENGTH_KEYS.keys():
        return None
    alphas, count = [config.get("lora_alpha", 8)], len(given["modules"])
    for module in given["modules"]:
        ours = "to_q" in module
        if rank != (1 if ours and "rank_pattern" in keys else config.get("r", 8)):
            return None
        alphas.append(1.0 if ours and "alpha_pattern" in keys else alphas[0])
    if not all(type(a) in (int, float) and 0 < a < 1e30 for a in alphas):
        return None
    below = math.sqrt(rank) if "use_rslora" in keys else rank
    if not given["alphas"]:
        return [alpha / below for alpha in alphas[1:]]
    both = told and ("use_rslora" in keys or given["alphas"] != alphas[1:])
    if both or len(given["alphas"]) < count:
        return None
    good = all(0 < alpha < 1e30 for alpha in given["alphas"])
    return [alpha / rank for alpha in given["alphas"]] if good else None


def _check_lora(given: dict[str, Any], folder: Path) -> str:
    path, wanted = _write(given, folder), _strengths(given)
    with core.refused() as lines, contextlib.redirect_stdout(io.StringIO()) as said:
        layers = lora_reading.read(path, NAMES)
    if lines:
        if wanted is not None:
            raise core.Wrong(f"refused though plain: {lines[0]}")
        return core.REFUSED
    if wanted is None:
        raise core.Wrong("accepted though it is no plain LoRA")
    if (
        given["place"] == "none"
        and not given["alphas"]
        and "alpha" not in said.getvalue()
    ):
        raise core.Wrong("no alpha is told, and nothing is said")
    if given["extra"] == LEFT_OUT and "left out" not in said.getvalue():
        raise core.Wrong("a text encoder is left out, and nothing is said")
    for number, (module, strength) in enumerate(
        zip(given["modules"], wanted, strict=True)
    ):
        a, b, found = layers[module]
        theirs = _factors(given["rank"], number)
        change = strength * theirs["B"] @ theirs["A"]
        if not np.allclose(found * b @ a, change, rtol=1e-6):
            raise core.Wrong(f"{module}: not {strength} times B A")
    return core.RIGHT


def check_bytes(data: bytes) -> str:
    """Every reader on these bytes; what is accepted the library reads alike."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.safetensors"
        path.write_bytes(data)
        outcomes = {_check_tensors(path, data)}
        for read in (weights.load, lambda file: lora_reading.read(file, NAMES)):
            with core.refused() as lines, contextlib.redirect_stdout(io.StringIO()):
                read(path)
            outcomes.add(core.REFUSED if lines else core.RIGHT)
    return core.RIGHT if core.RIGHT in outcomes else core.REFUSED


def _check_tensors(path: Path, data: bytes) -> str:
    with core.refused() as lines:
        found = safetensors_files.read_header(path).tensors
        safetensors_files.check_sum(path)
        ours = {name: stored.map() for name, stored in found.items()}
    if lines:
        return core.REFUSED
    try:
        theirs = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError as error:
        raise core.Wrong(f"the library refuses it: {error}") from error
    if theirs.keys() != ours.keys():
        raise core.Wrong("other names than the library's")
    for name, value in theirs.items():
        same = ours[name].tobytes() == bytes(value["data"])
        if not same or list(ours[name].shape) != list(value["shape"]):
            raise core.Wrong(f"{name!r}: other values than the library's")
    return core.RIGHT


def check(given: dict[str, Any]) -> str:
    if "bytes" in given:
        return check_bytes(given["bytes"])
    with tempfile.TemporaryDirectory() as folder:
        return _check_lora(given, Path(folder))


def _seeds() -> list[bytes]:
    """Files of ours, with a checksum, and of the library."""
    factors = {
        f"{module}.lora_{letter}.weight": value
        for number, module in enumerate(MODULES)
        for letter, value in _factors(2, number).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        adapter = lora_files.Adapter(factors, 4.0)
        ours = lora_files.write_diffusers(folder, adapter).read_bytes()
        weights.save(Path(folder) / "w.safetensors", {"a": {"b": np.ones(3)}}, {"w": 1})
        embedded = (Path(folder) / "w.safetensors").read_bytes()
    told = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 4})
    return [ours, embedded, save(factors, {lora_reading.METADATA: told}), save(factors)]


def surface() -> core.Surface:
    return core.Surface(
        "tensor_files", _files() | _loras(), check, _seeds(), check_bytes
    )
