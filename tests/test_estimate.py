"""The plan of a run before it starts: formulas, chips that are not here, the table."""

import importlib.util
import signal
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from flowgrpo_jax import assemble, cli, estimate
from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import sizes
from flowgrpo_jax.cost import budget, flops, topology
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import mesh as meshes

PAPER = "model=sd3.5-medium"


def work_on(devices, shape=None, argument=PAPER, **values):
    config = configs.make(argument, **values)
    mesh = meshes.make_abstract_mesh(shape or {"data": -1}, devices)
    return assemble.make_work(config, mesh, *assemble.abstract_model(config))


@pytest.fixture(scope="module")
def paper():
    return work_on(8, microbatch=4, remat="full")


def test_paper_iteration(paper):
    """Oracle: by hand; 1,152 images of 10 steps, 9 of them trained, with guidance.

    docs/golden_numbers.md 15: 2.224 TF a pass at 512 pixels and 205 tokens of text, 7.13 TF
    a trained step with a reference, 2.515 TF a decoded image.
    """
    made = budget.of(paper)
    passes = made.passes
    assert (made.parameters, made.trained) == (2_243_171_520, 18_776_064)
    assert passes[:3] == (1152, 11520, 10368)
    assert passes[3:] == (1440, 1296) and made.waiting == pytest.approx(0, abs=1e-9)
    each = 1152 * (20 * 2.224e12 + 18 * 7.13e12 + 2.515e12)
    assert made.total == pytest.approx(each, rel=2e-3)
    assert made.floor(flops.CHIPS["v5e"]) == pytest.approx(each / 8 / 197e12, rel=2e-3)
    # All but the second matrix of the MLP, a third, whose result no LoRA asks for.
    again = 2 / 3 * made.forward.linear + made.forward.attention
    assert made.operations.rerun == pytest.approx(2 * again, rel=1e-3)


def test_bytes(paper):
    """Oracle: by hand; bf16 weights with an fp32 VAE of 83.8 M, three LoRAs in fp32."""
    held = budget.of(paper).bytes
    assert held["weights"] == pytest.approx(2 * 2_243_171_520 + 4 * 49.5e6, rel=0.04)
    # Learner, two moments and EMA.
    assert held["training state"] == pytest.approx(4 * 4 * 18_776_064, rel=1e-4)
    # A sum and one microbatch's.
    assert held["gradients"] == 2 * 4 * 18_776_064 and held["gathered weights"] == 0
    assert held["activations"] == pytest.approx(8 * 94 / 24 * 0.0906e9, rel=1e-3)


def test_full_state_in_shards():
    """Oracle: by hand; four fp32 trees over eight devices, one block whole in bf16."""
    work = work_on(8, {"fsdp": 8}, train__use_lora=False)
    made = budget.of(work)
    held, count = made.bytes, 2_243_171_520
    assert made.trained == count
    # The small layers of time and pooled text, 8.3 M, and the biases stay whole.
    assert held["training state"] == pytest.approx(2 * count + 14 * 8.3e6, rel=5e-3)
    # A dual block: three attentions less one's context (6 + 2 + 4), two MLPs (16), and
    # the modulation of image and text (9 + 6), each of width by width.
    block = 43 * 1536**2
    assert held["gathered weights"] == 2 * block
    # The sum and one microbatch's in shards, and of one block whole, all in fp32.
    shards = 2 * (4 / 8) * count
    assert held["gradients"] == pytest.approx(shards + 4 * block, rel=0.03)


def test_devices_that_wait():
    """Oracle: by hand; 24 prompts of an update on 64 devices: each has one or none."""
    made = budget.of(work_on(64, microbatch=4))
    assert made.passes.busiest_sampling == 240
    assert made.passes.busiest_learning == 2 * 216
    even = 11520 / 64, 10368 / 64
    assert made.waiting > 1 - max(even[0] / 240, even[1] / 432)


def test_embedded_model_and_pretraining_have_a_plan():
    """Oracle: three lines; pretraining samples nothing."""
    for options in ({}, {"recipe": "pretrain", "prompts_per_iteration": 16}):
        work = work_on(2, argument=None, group_size=4, **options)
        lines = budget.summary(work, "cpu")
        assert len(lines) == 3 and "at least" not in lines[1]
    assert lines[1].startswith("iteration: 16 images, 0 evaluations to sample, 16 to")
    assert "at least" in budget.summary(work, "TPU v5 lite")[1]


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", None),
        ("cpu", None),
    ],
)
def test_chips_by_their_own_names(kind, name):
    """Oracle: the names that jax gives for these devices."""
    assert flops.chip_name(kind) == name


def test_topologies():
    """Oracle: by hand."""
    assert topology.parse("v5e:2x4", flops.CHIPS) == ("v5e", 8)
    assert topology.parse("v5p:4x4x4", flops.CHIPS) == ("v5p", 64)
    assert topology.parse("v5e:1x1", flops.CHIPS) == ("v5e", 1)
    # Two devices to a chip, under the name of the compiler and that of its neighbours.
    assert topology.parse("tpu7x:2x2x1", flops.CHIPS) == ("tpu7x", 8)
    assert topology.parse("v7x:2x2x1", flops.CHIPS) == ("tpu7x", 8)
    mesh, why = topology.make_mesh("H100:8", {"data": -1})
    assert mesh.size == 8 and "programs for H100" in str(why)


@pytest.mark.parametrize(
    "wrong",
    ["v5e", "v5e:", "v9:2", "v5e:0x2", "v5e:2x", "", ":2x2", "v5e:²x2", "v5e:2x2 "]
    + ["v5e:2:2", "V5E:2x2", "v5e:-1x2", "tpu7x", "v5e:" + "9" * 5000],
)
def test_topologies_that_are_none(wrong):
    """Oracle: the line, which names what is allowed."""
    with pytest.raises(UserError) as caught:
        topology.parse(wrong, flops.CHIPS)
    assert str(caught.value).startswith(f"--topology: {wrong}: must be one of v5e, ")


@pytest.mark.parametrize(
    "wrong, line",
    [
        ("v5e:8", "must look like v5e:2x2"),
        ("v5e:2x2x2", "must look like v5e:2x2"),
        ("v5p:2x2", "must look like v5p:2x2x2"),
        ("v7x:4", "must look like tpu7x:2x2x2"),
        ("H100:2x4", "must look like H100:2"),
        ("v5e:9999x9999", "99,980,001 devices: at most 16,384"),
    ],
)
def test_topologies_of_another_form(wrong, line):
    """Oracle: the lines, by hand."""
    with pytest.raises(UserError) as caught:
        topology.parse(wrong, flops.CHIPS)
    assert str(caught.value) == f"--topology: {wrong}: {line}"


class Lowered:
    """A program whose compilation ends as told."""

    def __init__(self, message):
        self.message = message

    def compile(self):
        raise RuntimeError(self.message)


REFUSALS = {
    "RESOURCE_EXHAUSTED: ... Used 20.50G of 15.75G hbm. Exceeded hbm capacity": 20.5,
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (16.03G) exceeds available HBM (15.75G).": 16.03,
    "the total memory required for HLO arguments (1.50T) exceeds": 1536,
}


@pytest.mark.parametrize("message, size", REFUSALS.items())
def test_what_does_not_fit_is_told_in_bytes(message, size):
    """Oracle: the messages of libtpu 0.0.42 and 0.0.42.1, and a sibling."""
    assert topology.compiled(Lowered(message)).bytes == size * 2**30


@pytest.mark.parametrize(
    "message",
    [
        "E1000: CompileTimeHbmOom:\nno number here",  # how libtpu 0.0.50.1 begins
        "RESOURCE_EXHAUSTED: something new\nin two lines",
        "INTERNAL: Out of memory while allocating",
        "it exceeds capacity",
    ],
)
def test_refusals_in_words_that_are_not_known(message):
    """Oracle: the contract; the first line is what can be said."""
    with pytest.raises(topology.DoesNotFit) as caught:
        topology.compiled(Lowered(message))
    assert str(caught.value) == message.splitlines()[0]


def test_other_failures_of_the_compiler_stay_what_they_are():
    """Oracle: another error is raised as it is."""
    with pytest.raises(RuntimeError, match="other"):
        topology.compiled(Lowered("other"))


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the extra tpu"
)


@needs_libtpu
@pytest.mark.parametrize(
    "name, devices",
    [("v5e:1x1", 1), ("v5e:2x1", 2), ("v5p:1x1x1", 1), ("v7x:2x2x1", 8)],
)
def test_libtpu_knows_the_chips(name, devices):
    """Oracle: libtpu; as many as `parse` says, of the kind that `cost` knows."""
    mesh, why = topology.make_mesh(name, {"data": -1})
    kind, count = topology.parse(name, flops.CHIPS)
    assert why is None and mesh.size == count == devices
    assert flops.chip_name(mesh.devices.flat[0].device_kind) == kind
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@needs_libtpu
def test_libtpu_refuses_what_does_not_fit():
    """Oracle: libtpu itself; by hand, two arrays of 4 GiB fit a chip of 16 GB.

    And of 20 GiB do not: the same program, told in bytes and not as an error.
    """
    mesh, _ = topology.make_mesh("v5e:1x1", {"data": -1})
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    sizes = {}
    for count in (1024, 5120):
        like = jax.ShapeDtypeStruct((count, 1024, 1024), np.float32, sharding=where)
        lowered = jax.jit(lambda x: x[::-1] + 1).lower(like)
        sizes[count] = topology.compiled(lowered).bytes
    assert sizes[1024] == pytest.approx(8 * 2**30, rel=0.01)
    assert sizes[5120] == pytest.approx(40 * 2**30, rel=0.01)


@needs_libtpu
def test_libtpu_knows_no_such_slice():
    """Oracle: the line, which names what may stand there."""
    with pytest.raises(UserError, match="^--topology: v5e:3x5: .*sizes must be even"):
        topology.make_mesh("v5e:3x5", {"data": -1})


def test_prompts_are_counted_where_they_are(tmp_path):
    """Oracle: by hand; without their files the size of one is told, and no error."""
    for name, count in (("train", 30), ("test", 4)):
        lines = "".join(f"{name} {number}\n" for number in range(count))
        (tmp_path / f"{name}.txt").write_text(lines)
    files = {
        "prompts": f"{tmp_path}/train.txt",
        "eval__prompts": f"{tmp_path}/test.txt",
    }
    config = configs.make(PAPER, num_iterations=100, **files)
    model, _ = assemble.abstract_model(config)
    each = 2 * (205 * 4096 + 2048)
    told = estimate.text(config, model)
    assert told.startswith(f"at most 35 prompts to encode, {each / 1e6:.2f} MB each, ")
    config.prompts = "no.txt"
    told = estimate.text(config, model)
    assert told.startswith("1.68 MB a prompt; how many is not known here: prompts: no.")


def test_the_largest_size_of_the_prompts_is_estimated(tmp_path):
    """Oracle: by hand; carried out as the run is, and without the file at its own size."""
    lines = ('{"prompt": "a"}', '{"prompt": "b", "resolution": "768x1344"}')
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    config = configs.make(PAPER, prompts=f"{tmp_path}/train.jsonl")
    mesh = meshes.make_abstract_mesh({"data": -1}, 8)
    work = assemble.make_policy_work(config, mesh, *sizes.largest_abstract(config))
    assert work.model.size == (768, 1344) and work.model.denoiser.remat == "full"
    table = work.frozen["buffers"]["pos_embed"]["table"]
    assert table.shape[:2] == (48, 84)  # 16 pixels a patch
    config.prompts = "no.jsonl"
    assert sizes.largest_abstract(config)[0].size == (512, 512)


def test_verdict_names_the_change():
    """Oracle: by hand; rematerialisation, then shards, then the microbatch."""
    mesh = meshes.make_abstract_mesh({"data": -1}, 8)
    needed = {"rollout": 8e9, "update": 20e9}
    cases = [
        ({"remat": "none"}, "take --config.remat=full"),
        ({"remat": "full", "train__use_lora": False}, "take --config.mesh.fsdp=8"),
        ({"remat": "full", "microbatch": 4}, "take --config.microbatch=2"),
        ({"remat": "full", "microbatch": 1}, "take chips with more memory, a LoRA or"),
    ]
    for values, change in cases:
        config = configs.make(**values)
        line = estimate.verdict(config, mesh, needed, 16e9)
        assert line.startswith(f"does not fit: 20.0 of 16 GB: {change}")
        assert estimate.verdict(config, mesh, needed, 32e9) == "fits: 20.0 of 32 GB"


def test_program_bytes_hold_what_xla_counts():
    """Oracle: by hand; two arguments, a result and no temporaries on this CPU."""
    like = jax.ShapeDtypeStruct((1000, 1000), np.float32)
    lowered = jax.jit(lambda a, b: a + b).lower(like, like)
    assert topology.compiled(lowered).bytes == pytest.approx(12e6, rel=0.01)


def test_rows_of_the_table(tmp_path, monkeypatch, paper):
    """Oracle: the arguments are the key: the same ones replace their row."""
    path, made = tmp_path / "estimates.md", budget.of(paper)
    needed = {"rollout": 7.9e9, "update": 10.6e9}
    for first in ("--config=a", "--config=b", "--config=a"):
        monkeypatch.setattr(sys, "argv", ["estimate", first, "--table=x"])
        answer = estimate.verdict(configs.make(PAPER), paper.mesh, needed, 16e9)
        estimate.write_row(path, estimate.table_row(made, "v5e", needed, answer))
    rows = [line for line in path.read_text().splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[0] for row in rows] == ["| `--config=a`", "| `--config=b`"]
    assert "| 8 v5e | 18.8 M of 2,243 M |" in rows[0]
    assert rows[0].endswith("| 7.9 | 10.6 | fits: 10.6 of 16 GB |")


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["estimate", *words])
    monkeypatch.chdir(Path(__file__).parents[1])
    cli.parse(estimate.FLAGS)
    estimate.main()
    return capsys.readouterr().out.splitlines()


def test_a_refusal_without_a_number_is_a_verdict(monkeypatch, capsys, tmp_path):
    """Oracle: the last line and the row, by hand; rollout fits, the update does not."""
    first = "E1000: CompileTimeHbmOom: too large"

    def compile_programs(work, costs):
        yield estimate.Program("rollout", 1e9, 1.0)
        raise topology.DoesNotFit(first)

    monkeypatch.setattr(estimate, "compile_programs", compile_programs)
    mesh = meshes.make_mesh({"data": 1})
    monkeypatch.setattr(topology, "make_mesh", lambda name, shape: (mesh, None))
    table = tmp_path / "estimates.md"
    lines = run(
        monkeypatch,
        capsys,
        "--config=configs/geneval.py:recipe=flow_grpo",
        "--config.prompts_per_iteration=2",
        "--config.group_size=2",
        "--config.updates_per_iteration=1",
        "--config.sample.num_steps=2",
        "--topology=v5e:1x1",
        f"--table={table}",
    )
    answer = f"does not fit: {first}: take --config.remat=full"
    assert lines[-1] == answer and lines[-2].startswith("compiled        rollout: ")
    assert table.read_text().splitlines()[-1].endswith(f"| not compiled | {answer} |")


def test_tune_writes_no_row(monkeypatch, capsys, tmp_path):
    """Oracle: the line; nothing is written."""
    table = tmp_path / "estimates.md"
    words = ["--config=configs/geneval.py", "--topology=H100:2", f"--table={table}"]
    # In place of the flag, which would stay set in this process.
    monkeypatch.setattr(estimate, "_TUNE", types.SimpleNamespace(value=True))
    with pytest.raises(UserError, match="^--table: with --tune: "):
        run(monkeypatch, capsys, *words)
    assert not table.exists()


def test_the_command_without_a_compiler(tmp_path, monkeypatch, capsys):
    """Oracle: the lines by hand; GPUs have no compiler here, the formula decides."""
    table = tmp_path / "estimates.md"
    words = ["--config=configs/geneval.py", "--topology=H100:2", f"--table={table}"]
    lines = run(monkeypatch, capsys, *words)
    assert lines[0].startswith("run             sprites, recipe flow_grpo_fast_v1")
    assert any(
        line.startswith("compiled        no: programs for H100") for line in lines
    )
    assert any(line.startswith("links           sums ") for line in lines)
    assert any(" data at 450 GB/s by NVLink" in line for line in lines)
    assert lines[-1].startswith("fits by the formula: 0.")
    row = table.read_text().splitlines()[-1]
    assert row.startswith(
        "| `--config=configs/geneval.py --topology=H100:2` | 2 H100 |"
    )
    assert row.count("not compiled") == 2


def test_what_is_estimated_is_what_a_run_compiles():
    """Oracle: `make_work`, whose workload a run has; the command asks for a policy's."""
    config, mesh = (
        configs.make(remat="dense"),
        meshes.make_abstract_mesh({"data": 2}, 2),
    )
    model = assemble.abstract_model(config)
    asked = [
        make(config, mesh, *model).model.denoiser
        for make in (assemble.make_work, assemble.make_policy_work)
    ]
    assert asked[0] == asked[1] and asked[1].remat == "dense"
