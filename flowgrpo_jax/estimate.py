"""Estimates what a run costs and whether it fits, before anyone rents a chip.

python -m flowgrpo_jax.estimate --config=configs/pickscore.py \\
  --topology=v5e:2x4 --config.microbatch=4 --config.remat=full

Parameters, operations and bytes come from formulas. Where libtpu is installed
(pip install "jax[tpu]"), rollout and update are compiled for the TPU, which need not be
there. --table=docs/estimates.md writes the result as a row of that table.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from flowgrpo_jax import assemble, cli
from flowgrpo_jax.assemble import sizes, specs
from flowgrpo_jax.config import checks
from flowgrpo_jax.cost import budget, flops, topology
from flowgrpo_jax.engine.workload import PolicyWork
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.flow_model import FlowModel
from flowgrpo_jax.runtime.mesh import AnyMesh

FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config of the run: FILE.py or FILE.py:model=NAME,recipe=NAME.",
    FLAGS,
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "Chips to run on: v5e:1x1, v5e:2x4, v5p:2x2x2, v6e:4x4, tpu7x:2x2x1, H100:8, ...",
    FLAGS,
)
_TABLE = flags.DEFINE_string(
    "table", None, "Also write a row into this Markdown file.", FLAGS
)

_TABLE_HEAD = """# Estimates

Every row was written by `python -m flowgrpo_jax.estimate --table=docs/estimates.md` and
the arguments in it. With two numbers under rollout and update: what the TPU compiler says,
ahead of time, with no TPU present. With "not compiled" there: by the formulas of
`cost/budget.py`, which are a lower bound (6.9 GB where the compiler says 10.7). Bytes are those
of one device, GB is 10^9; a chip of tpu7x is two devices, and devices are counted. The
floor is the time of an iteration at 100% of the device's dense bf16 rate, by the formulas
of `cost/flops.py`. Nothing here was run on a TPU.

| arguments | chips | trained | PFLOP an iteration | floor, s | rollout, GB | update, GB | |
|---|---|---|---|---|---|---|---|
"""
_PROGRAMS = ("rollout", "update")


def main() -> None:
    config = cli.required_config(_CONFIG)
    if _TOPOLOGY.value is None:
        raise UserError("--topology: missing: give chips, such as v5e:2x4")
    work, chip, why_not = workload(config, _TOPOLOGY.value)
    costs = budget.of(work)
    print(*describe(config, work, costs, chip), sep="\n")
    if work.model.tokenizer is None:  # its encoders do not learn: a cache on disk
        print(f"text            {text(config, work.model)}", flush=True)
    answer = ""
    for needed, answer in answers(config, work, costs, chip, why_not):
        if _TABLE.value:  # the next program may take long
            write_row(Path(_TABLE.value), table_row(costs, chip, needed, answer))
    print(answer)


def fit(config: ConfigDict, name: str) -> str:
    """A line that begins with "fits", or tells what to change, for chips by their name."""
    work, chip, why_not = workload(config, name)
    *_, (_, answer) = answers(config, work, budget.of(work), chip, why_not)
    return answer


def workload(config: ConfigDict, name: str) -> tuple[PolicyWork, str, str | None]:
    """(what runs on chips of this name, their kind, why it cannot be compiled here)."""
    chip, _ = topology.parse(name, flops.CHIPS)
    # Chips of this machine are not needed, and another process may hold them.
    jax.config.update("jax_platforms", "cpu")
    checks.check(config)
    mesh, why_not = topology.make_mesh(name, config.mesh.to_dict())
    if assemble.pretrains(config):
        raise UserError(
            f"train.objective: {config.train.objective}: what pretraining costs is not "
            "estimated: give a config that learns from rewards"
        )
    work = assemble.make_policy_work(config, mesh, *sizes.largest_abstract(config))
    return work, chip, why_not


def answers(
    config: ConfigDict,
    work: PolicyWork,
    costs: budget.Budget,
    chip: str,
    why_not: str | None,
) -> Iterator[tuple[dict[str, float], str]]:
    """(bytes by program so far, "" or the answer): the last one has the answer."""
    memory = flops.CHIPS[chip].memory
    if why_not:
        print(f"compiled        no: {why_not}")
        needed = {"formula": float(sum(costs.bytes.values()))}
        yield needed, verdict(config, work.mesh, needed, memory)
        return
    needed = {}
    try:
        for name, size, taken in compile_programs(work):
            needed[name] = size
            figures = f"{budget.gigabytes(size)} ({taken:.0f} s)"
            print(f"compiled        {name}: {figures}", flush=True)
            yield needed, ""
        yield needed, verdict(config, work.mesh, needed, memory)
    except topology.DoesNotFit as refusal:
        yield needed, f"does not fit: {refusal}: {remedy(config, work.mesh)}"


def describe(
    config: ConfigDict, work: PolicyWork, costs: budget.Budget, chip: str
) -> list[str]:
    """What the formulas say: one line for each question."""
    each, passes = costs.operations, costs.passes
    mesh = " x ".join(f"{name} {size}" for name, size in work.mesh.shape.items())
    ways = f"LoRA of rank {config.train.lora_rank}" if config.train.use_lora else "full"
    tera = budget.operations
    lines = [
        f"run             {work.model.name}, recipe {config.recipe}, microbatch "
        f"{config.microbatch}, remat {config.remat}; mesh {mesh}; "
        f"pictures of {work.model.size} pixels",
        f"parameters      {costs.parameters:,}; trained {costs.trained:,} ({ways})",
        f"one image       {tera(costs.total / passes.images)}: a sampled step "
        f"{tera(each.sampling)}, a trained one {tera(each.learning)}, decoding "
        f"{tera(each.decoding)}",
        f"one iteration   {tera(costs.total)}: {passes.images:,} images, "
        f"{passes.sampling:,} sampled and {passes.learning:,} trained steps",
        f"floor           {budget.floor_line(costs, chip)}",
        *(f"                {line}" for line in on_top(work, costs, chip)),
        f"bytes, formula  {budget.memory_line(costs)}",
    ]
    return lines


def text(config: ConfigDict, model: FlowModel) -> str:
    """What the prompts of the run take, encoded; they need not be on this machine."""
    try:
        prompts = assemble.load_prompt_set(config.prompts, "train")
        held_out = assemble.load_prompt_set(config.eval.prompts, "test", "eval.prompts")
    except UserError as error:
        each = budget.prompt_bytes(model) / 1e6
        return f"{each:.2f} MB a prompt; how many is not known here: {error}"
    spec, folder = specs.policy_spec(config), config.embedding_cache
    return budget.text_line(spec, model, prompts, held_out, folder)


def on_top(work: PolicyWork, costs: budget.Budget, chip: str) -> list[str]:
    """What keeps a run above its floor, as far as it is known beforehand."""
    lines = []
    if costs.operations.rerun:
        share = costs.operations.rerun * costs.passes.learning / costs.total
        lines.append(
            f"{share:.0%} more operations by remat {work.model.denoiser.remat}"
        )
    depth = work.model.denoiser.head_dim
    factor = flops.head_factor(costs.forward, flops.CHIPS[chip], depth)
    if factor > 1.005:
        lines.append(
            f"times {factor:.2f}: heads of {depth} features leave lanes of the matrix "
            "unit idle"
        )
    if costs.waiting > 0.02:
        lines.append(
            f"in it devices wait {costs.waiting:.0%} of the time: whole groups do not "
            "divide evenly; take prompts_per_iteration a multiple of "
            f"{costs.devices * work.updates.updates_per_iteration}"
        )
    return lines


def compile_programs(work: PolicyWork) -> Iterator[tuple[str, float, float]]:
    """(program, bytes of one device with all else that stays there, seconds taken)."""
    arguments = work.arguments()
    for name in _PROGRAMS:
        begin = time.monotonic()
        lowered = getattr(work, name).lower(*arguments[name])
        needed = topology.compiled_bytes(lowered)
        if name == "rollout":  # the optimizer's state and the averages wait meanwhile
            needed += flops.bytes_on_device(work.resident())
            needed -= flops.bytes_on_device(arguments[name][0])
        yield name, needed, time.monotonic() - begin


def verdict(
    config: ConfigDict, mesh: AnyMesh, needed: dict[str, float], memory: float
) -> str:
    """A line such as "fits: 11.2 of 16 GB", or what to change."""
    name, most = max(needed.items(), key=lambda item: item[1])
    figures = f"{most / flops.GB:.1f} of {memory / flops.GB:.0f} GB"
    by = " by the formula" if name == "formula" else ""
    if most <= memory:
        return f"fits{by}: {figures}"
    return f"does not fit{by}: {figures}: {remedy(config, mesh)}"


def remedy(config: ConfigDict, mesh: AnyMesh) -> str:
    """The cheapest change that is still possible."""
    if config.remat != "full":
        return "take --config.remat=full"
    if mesh.shape["fsdp"] < mesh.size and not config.train.use_lora:
        return f"take --config.mesh.fsdp={mesh.size}"
    if config.microbatch > 1:
        return f"take --config.microbatch={config.microbatch // 2}"
    return "take chips with more memory, a LoRA or a lower resolution"


# -- the table ------------------------------------------------------------------------


def table_row(
    costs: budget.Budget, chip: str, needed: dict[str, float], answer: str
) -> str:
    """A row of docs/estimates.md; its first cell has the arguments of the command."""
    arguments = [word for word in sys.argv[1:] if not word.startswith("--table")]
    sizes = [
        f"{needed[name] / flops.GB:.1f}" if name in needed else "not compiled"
        for name in _PROGRAMS
    ]
    cells = [
        f"`{' '.join(arguments)}`",
        f"{costs.devices} {chip}",
        f"{costs.trained / 1e6:,.1f} M of {costs.parameters / 1e6:,.0f} M",
        f"{costs.total / 1e15:.1f}",
        f"{costs.floor(flops.CHIPS[chip]):.1f}",
        *sizes,
        answer,
    ]
    return f"| {' | '.join(cells)} |"


def write_row(path: Path, row: str) -> None:
    """Add the row, or put it in the place of the one with the same arguments."""
    text = path.read_text() if path.exists() else _TABLE_HEAD
    first = row.split(" | ")[0] + " | "
    lines = text.splitlines()
    same = [number for number, line in enumerate(lines) if line.startswith(first)]
    for number in same:
        lines[number] = row
    path.write_text("\n".join(lines if same else [*lines, row]) + "\n")


if __name__ == "__main__":
    cli.run(main, FLAGS)
