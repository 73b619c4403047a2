"""Back ends on other machines: what they would run, and what is refused before."""

import json
import shlex
import subprocess

import pytest
import yaml

from flowgrpo_jax.errors import UserError
from launch import gke, hyper, remote, sky, topologies, tpu_vm
from tests.launch import fakes


@pytest.fixture
def sweep(tmp_path):
    """Two units; their root, and a value, have what a shell would read."""
    points = hyper.product(
        [
            hyper.sweep("config.sample.sde_window_range", [(0, 5)]),
            hyper.sweep("config.negative_prompt", ["it's a $HOME `dog`", "b"]),
        ]
    )
    return fakes.sweep(tmp_path, points, "My_Sweep")


@pytest.fixture
def flags(monkeypatch):
    """Parse flags of a back end; they are as before after the test."""

    def parse(module, *words):
        holders = module.FLAGS.flag_values_dict()
        module.FLAGS(["launch", *words])

        def back():
            for name, value in holders.items():
                module.FLAGS[name].value = value

        undo.append(back)

    undo = []
    yield parse
    for back in reversed(undo):
        back()


def words_of(line):
    """What a shell makes of a line, by the shell itself."""
    shown = f"for word in {line}; do printf '%s\\0' \"$word\"; done"
    done = subprocess.run(["bash", "-c", shown], capture_output=True, text=True)
    return done.stdout.split("\0")[:-1]


def test_one_command_for_a_shell(sweep):
    """Oracle: bash itself; a workdir and values with spaces, quotes and dollars."""
    unit = sweep.units[0]
    line = remote.command(sweep, unit, "/a bucket/runs")
    assert words_of(line) == [
        *("exec", "python", "-m", "launch.unit"),
        *unit.words,
        f"--workdir=/a bucket/runs/My_Sweep/{unit.name}",
    ]
    assert remote.name(sweep, unit) == "sweep-my-sweep-1"


# estimate's name, xpk's, SkyPilot's.
CHIPS = [
    ("v5e:2x4", "v5litepod-8", "tpu-v5e-8"),
    ("v5p:2x2x1", "v5p-8", "tpu-v5p-8"),
    ("v6e:2x2", "v6e-4", "tpu-v6e-4"),
    ("h100:8", "h100-80gb-8", "H100:8"),
    ("H200:8", "h200-141gb-8", "H200:8"),
]


@pytest.mark.parametrize("name, xpk, accelerators", CHIPS)
def test_chips_by_the_names_of_others(name, xpk, accelerators):
    """Oracle: the names in xpk 1.16's help and SkyPilot 0.14's list, by hand."""
    chips = topologies.parse(name)
    topologies.one_machine(name, chips)
    assert gke.device_type(chips) == xpk
    assert sky.resources(chips)["accelerators"] == accelerators


WRONG = [
    ("v5e:3x", "--topology: v5e:3x: must be one of v5e"),
    ("x9:2", "--topology: x9:2: must be one of v5e, .*; or cpu"),
    ("v6e:4x4", "16 chips are several machines.*at most 8 of v6e"),
]


@pytest.mark.parametrize("name, line", WRONG)
def test_chips_that_cannot_be(name, line):
    """Oracle: the lines, by hand."""
    with pytest.raises(UserError, match=line):
        topologies.one_machine(name, topologies.parse(name))


XPK = """
import re, sys
flags = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:] if "=" in word)
with open(flags["output-manifest-file"], "w") as file:
    file.write(f"parallelism: {2 if flags['device-type'] == 'v6e-8' else 1}\\n")
    file.write(flags["command"])
"""
GKE = ("--cluster=c", "--project=p", "--zone=z", "--image=my image", "--dry_run")


def test_gke_renders_every_manifest(sweep, flags, tmp_path, monkeypatch, capsys):
    """Oracle: the words that a program of xpk's name was given; bash for the line."""
    fakes.script(tmp_path, "xpk", XPK, monkeypatch)
    flags(gke, *GKE, "--topology=v6e:2x2", "--remote_root=/b c")
    monkeypatch.setattr(gke.command, "prepared", lambda *_: sweep)
    gke.main([])
    told = [line for line in capsys.readouterr().out.splitlines() if line[:1] == "+"]
    assert len(told) == 2
    argv = words_of(told[0][2:])
    assert (
        argv[:3] == ["xpk", "workload", "create"] and "--docker-image=my image" in argv
    )
    line = (sweep.path / "gke" / "1.yaml").read_text().splitlines()[1]
    assert f"--command={line}" in argv
    assert words_of(line)[-1].startswith("--workdir=/b c/My_Sweep/1-")
    flags(gke, *GKE, "--topology=v6e:2x4")
    with pytest.raises(UserError, match="v6e:2x4: is 2 machines on GKE"):
        gke.main([])


def test_sky_writes_a_task_for_each_unit(sweep, flags, monkeypatch, capsys):
    """Oracle: the file, read as YAML; bash for its command."""
    flags(sky, "--topology=v5e:2x4", "--bucket=gs://b/runs", "--dry_run")
    monkeypatch.setattr(sky.command, "prepared", lambda *_: sweep)
    sky.main([])
    assert capsys.readouterr().out.count("+ sky jobs launch --yes") == 2
    task = yaml.safe_load((sweep.path / "sky" / "1.yaml").read_text())
    assert task["resources"] == {
        "accelerators": "tpu-v5e-8",
        "accelerator_args": {"runtime_version": "v2-alpha-tpuv5-lite", "tpu_vm": True},
        "use_spot": True,
    }
    assert task["file_mounts"] == {
        "/sweeps": {"source": "gs://b/runs", "mode": "MOUNT_CACHED"}
    }
    assert words_of(task["run"])[4:-1] == list(sweep.units[0].words)


# A gcloud that takes the first VM away while its log is followed.
GCLOUD = """
import json, os, sys
words = sys.argv[1:]
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(words) + "\\n")
calls = [json.loads(line) for line in open(os.environ["CALLS"])]
created = sum("create" in call for call in calls)
followed = sum("tail" in word for call in calls for word in call)
taken = created == 1 and followed == 1
if "describe" in words:
    print("SUSPENDED" if taken else "ACTIVE")
elif taken and any("tail" in word for word in words):
    sys.exit("ssh: connection closed")
elif any("unit.json" in word for word in words):
    print('{"code": 0}')
"""
TPU = ("--project=p", "--zone=z", "--bucket=b", "--poll=0", "--topology=v5e:2x4")


def test_a_tpu_vm_that_is_taken_is_made_again(
    sweep, flags, tmp_path, monkeypatch, capsys
):
    """Oracle: the calls of a program of gcloud's name; each VM is deleted in the end."""
    fakes.script(tmp_path, "gcloud", GCLOUD, monkeypatch)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    flags(tpu_vm, *TPU, "--spot")
    monkeypatch.setattr(remote, "unfinished", lambda sweep: sweep.units[:1])
    monkeypatch.setattr(tpu_vm.command, "prepared", lambda *_: sweep)
    tpu_vm.main([])
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert all("--project=p" in call and "--zone=z" in call for call in calls)
    verbs = [call[3] for call in calls]
    once = ["create", "describe", "scp", "ssh", "ssh", "ssh"]
    assert verbs == [*once, "describe", "delete", *once, "ssh", "delete"]
    assert "its VM was taken" in capsys.readouterr().out


def test_a_dry_run_prints_what_a_shell_reads_right(
    sweep, flags, monkeypatch, capsys, tmp_path
):
    """Oracle: bash on every printed line; in it, on the command that the VM gets."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    flags(tpu_vm, *TPU, "--dry_run", "--remote_root=/tmp/bucket/my runs")
    monkeypatch.setattr(tpu_vm.command, "prepared", lambda *_: sweep)
    tpu_vm.main([])
    lines = capsys.readouterr().out.strip().split("\n+ ")
    argvs = [shlex.split(line.removeprefix("+ ")) for line in lines]
    assert all(words_of(line.removeprefix("+ ")) for line in lines)
    [start] = [word for word in argvs[5] if word.startswith("--command=nohup")]
    inner = shlex.split(start)[3]  # nohup bash -c WORD
    assert inner.startswith("cd repo && exec ~/env/bin/python -m launch.unit ")
    assert words_of(inner.split(" && ")[1])[4:-1] == list(sweep.units[0].words)
    assert inner.endswith(
        f"'--workdir=/tmp/bucket/my runs/My_Sweep/{sweep.units[0].name}'"
    )


NEEDED = [
    (tpu_vm, "gcloud: is not installed here: install the Google Cloud CLI"),
    (gke, r"xpk: is not installed here: pip install 'flowgrpo_jax\[gke\]'"),
    (sky, r"sky: is not installed here: pip install 'flowgrpo_jax\[sky\]'"),
]


@pytest.mark.parametrize("module, line", NEEDED)
def test_a_missing_program_is_one_line(module, line, monkeypatch, tmp_path, flags):
    """Oracle: the lines, by hand."""
    monkeypatch.setenv("PATH", str(tmp_path))
    flags(module)
    with pytest.raises(UserError, match=line):
        module.main([])


MISSING = [
    (tpu_vm, ["--topology=v5e:2x4"], "--project: missing: gcloud needs it"),
    (
        tpu_vm,
        ["--topology=h100:8"],
        "--topology: H100: must be one of v5e, v5p, v6e on",
    ),
    (sky, ["--topology=h100:8"], "--bucket: missing: what a machine writes is gone"),
    (sky, [], "--topology: missing: give the chips of a unit"),
    (gke, ["--topology=cpu"], "--topology: cpu: GKE is for chips"),
    (gke, ["--topology=v6e:2x2"], "--cluster: missing: xpk needs it"),
]


@pytest.mark.parametrize("module, words, line", MISSING)
def test_missing_flags_are_told(module, words, line, monkeypatch, tmp_path, flags):
    """Oracle: the lines, by hand."""
    for name in ("gcloud", "xpk", "sky"):
        fakes.script(tmp_path, name, "", monkeypatch)
    flags(module, *words)
    with pytest.raises(UserError, match=line):
        module.main([])
