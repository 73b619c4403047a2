"""What a run began with: its digest, other places of it, and whether anything moved."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import base_weights, restore
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime.workdir import open_workdir
from flowgrpo_jax.worlds import embedded
from tests.tiny import tiny_model


def variables():
    rng = np.random.default_rng(0)
    return {
        "transformer": {
            "kernel": rng.normal(size=(3, 5, 7)).astype(np.float32),
            "half": rng.normal(size=(4, 6)).astype(ml_dtypes.bfloat16),
            "scalar": np.float32(2.5)[None],
        },
        "buffers": {"ids": np.arange(6, dtype=np.int32)},
    }


def changed(tree, name, change):
    copy = jax.tree.map(np.copy, tree)
    change(copy["transformer"][name])
    return copy


def test_a_digest_is_of_values_wherever_they_are():
    """Oracle: an invariance; on the host, on a device, in shards, in another order."""
    host = variables()
    found = base_weights.digest(host)
    assert found == base_weights.digest(jax.tree.map(jnp.asarray, host))
    mesh = jax.make_mesh((4,), ("x",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    spread = jax.tree.map(jnp.asarray, host)
    spread["transformer"]["half"] = jax.device_put(host["transformer"]["half"], split)
    assert found == base_weights.digest(spread)
    assert found == base_weights.digest(dict(reversed(host.items())))
    strided = jax.tree.map(lambda x: np.asfortranarray(x), host)
    assert found == base_weights.digest(strided)


def swap(leaf):
    leaf[0, 0], leaf[0, 1] = leaf[0, 1].copy(), leaf[0, 0].copy()


def test_a_digest_tells_weights_apart():
    """Oracle: by hand; one bit, two values that change places, a type, a name."""
    host = variables()
    others = [
        changed(host, "kernel", lambda x: x.view(np.uint32).__ixor__(1)),
        changed(host, "half", swap),
        host | {"transformer": host["transformer"] | {"half": np.zeros((4, 6))}},
        {"transformer": host["transformer"], "buffer": host["buffers"]},
        {"transformer": host["transformer"]},
    ]
    found = {base_weights.digest(tree) for tree in [host, *others]}
    assert len(found) == len(others) + 1


def test_long_arrays_are_summed_in_blocks(monkeypatch):
    """Oracle: an invariance, and the device's sum."""
    leaf = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    whole = base_weights.digest({"a": leaf})
    monkeypatch.setattr(base_weights, "_BLOCK", 7)
    assert base_weights.digest({"a": leaf}) == whole
    assert base_weights.digest({"a": jnp.asarray(leaf)}) == whole


@pytest.fixture
def moved(weights_file, tmp_path):
    """(config, workdir, loaded, path of a copy of the same weights)."""
    config = configs.make(model=weights_file)
    loaded = restore.base(config).variables
    workdir = tmp_path / "run"
    open_workdir(workdir, config.to_dict()).close()
    base_weights.keep(workdir, config, loaded)
    copy = shutil.copy(weights_file, tmp_path / "copy.safetensors")
    return config, workdir, loaded, str(copy)


def others(path):
    """A file of the same kind of model with other weights."""
    model, host = tiny_model()
    embedded.save(path, jax.tree.map(lambda x: x + np.float32(1e-3), host), model)
    return str(path)


def test_a_run_goes_on_where_its_base_model_lies_now(moved):
    """Oracle: the config; its name stays, whichever way the new place is told."""
    config, workdir, loaded, copy = moved
    wanted = configs.from_json(config.to_dict())
    wanted.model_path = copy
    told = base_weights.at(config, copy)
    given = configs.from_json(config.to_dict())
    given.model = copy
    for found in (told, base_weights.moved(given, workdir)):
        assert found.to_dict() == wanted.to_dict()
        base_weights.keep(workdir, found, restore.base(found).variables)
        open_workdir(workdir, found.to_dict(), configs.MAY_DIFFER).close()
    held = json.loads((workdir / "base_model.json").read_text())
    assert held["model"] == config.model
    chosen = restore.choose_config(None, str(workdir))  # the last place that was told
    assert (chosen.model, chosen.model_path) == (config.model, copy)
    assert base_weights.moved(config, workdir) is config


def test_other_weights_in_its_place_are_refused(moved, tmp_path):
    """Oracle: the line; by a flag, by a name, and in the very place it was read from."""
    config, workdir, _, _ = moved
    path = others(tmp_path / "other.safetensors")
    given = configs.from_json(config.to_dict())
    given.model = path
    for wrong in (base_weights.at(config, path), base_weights.moved(given, workdir)):
        loaded = restore.base(wrong).variables
        for refuse in (base_weights.keep, base_weights.check):
            with pytest.raises(UserError) as caught:
                refuse(workdir, wrong, loaded)
            line = f"model: {path}: other weights than the run in {workdir} began with"
            assert str(caught.value).startswith(line)
    with pytest.raises(UserError, match=f"^model: {config.model}: other weights"):
        base_weights.keep(workdir, config, loaded)


@pytest.mark.parametrize("model", ["words", "sd3-medium", "/no/such/folder"])
def test_another_model_is_no_other_place(moved, model):
    """Oracle: the contract; the workdir then refuses the config, as ever."""
    config, workdir, _, _ = moved
    given = configs.from_json(config.to_dict())
    given.model = model
    assert base_weights.moved(given, workdir) is given
    with pytest.raises(UserError, match=f'^model: "{model}": workdir '):
        open_workdir(workdir, given.to_dict(), configs.MAY_DIFFER)


def test_what_cannot_be_another_place():
    """Oracle: the lines, by hand."""
    for config, path, line in [
        (
            configs.make(),
            "sd3-medium",
            "--model: sd3-medium: is not what the run began",
        ),
        (
            configs.make("model=sd3-medium"),
            "a.safetensors",
            "--model: a.safetensors: is",
        ),
        (
            configs.make("recipe=pretrain"),
            "a.safetensors",
            "--model: a.safetensors: the",
        ),
    ]:
        with pytest.raises(UserError, match=f"^{line}"):
            base_weights.at(config, path)
    config = configs.make()
    assert base_weights.at(config, None) is config


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '"a"'])
def test_a_broken_note_is_one_line(moved, text):
    """Oracle: the line names the file and what to do."""
    config, workdir, loaded, _ = moved
    (workdir / "base_model.json").write_text(text)
    with pytest.raises(
        UserError, match=r"^workdir: .*/base_model.json: cannot be read"
    ):
        base_weights.check(workdir, config, loaded)


def test_random_weights_are_not_noted(tmp_path):
    """Oracle: the contract; another machine may draw others from the same seed."""
    config = configs.make("recipe=pretrain")
    base_weights.keep(tmp_path, config, {"a": np.zeros(1)})
    assert not list(tmp_path.iterdir())


def lora(a, b):
    return {"lora": {"attn": {"a": np.float32(a), "b": np.float32(b)}}}


def test_what_differs_from_the_base_model():
    """Oracle: by hand; an adapter changes nothing while one of its factors is zero."""
    base = {"transformer": {"out": np.ones(3), "rest": np.zeros(2)}, "vae": {}}
    assert not base_weights.differs({"transformer": {"out": np.ones(3)}}, base)
    assert base_weights.differs({"transformer": {"out": np.ones(3) + 1e-9}}, base)
    assert base_weights.differs({"transformer": {"out": jnp.zeros(3)}}, base)
    assert not base_weights.differs(lora([[1.0]], [[0.0]]), base)
    assert not base_weights.differs(lora([[0.0]], [[1.0]]), base)
    assert base_weights.differs(lora([[0.0, 1e-20]], [[0.0, -1e-30]]), base)
    two = lora([[1.0]], [[0.0]])
    two["lora"]["ff"] = {"a": jnp.ones(1), "b": jnp.ones(1)}
    assert base_weights.differs(two, base)


def test_what_no_run_learns_may_be_another_crop(tmp_path, weights_file):
    """Oracle: by hand; how much of a positional table is read depends on the sizes."""
    config = configs.make(model=weights_file)
    base_weights.keep(tmp_path, config, variables())
    base_weights.check(
        tmp_path, config, variables() | {"buffers": {"ids": np.arange(9)}}
    )
    with pytest.raises(UserError, match="other weights than the run"):
        base_weights.check(tmp_path, config, changed(variables(), "half", swap))
