"""Estimates what a run costs and whether it fits, before anyone rents a chip.

python -m flowgrpo_jax.estimate --config=configs/pickscore.py \\
  --topology=v5e:2x4 --config.microbatch=4 --config.remat=full

Parameters, operations and bytes come from formulas. Where libtpu is installed
(pip install "jax[tpu]"), rollout and update are compiled for the TPU, which need not be
there. --table=docs/estimates.md writes the result as a row of that table. --tune finds
microbatch, remat, mesh.fsdp and reward_batches in place of those given.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from flowgrpo_jax import assemble, cli
from flowgrpo_jax.assemble import sizes, specs
from flowgrpo_jax.assemble import tuning as choices
from flowgrpo_jax.config import checks
from flowgrpo_jax.cost import budget, flops, hlo, topology, tuning
from flowgrpo_jax.cost.links import Way
from flowgrpo_jax.cost.tuning import Candidate
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

_TUNE = flags.DEFINE_bool(
    "tune",
    False,
    "Find the microbatch, remat, mesh.fsdp and reward_batches that fit and cost least.",
    FLAGS,
)

_TABLE_HEAD = """# Estimates

Every row was written by `python -m flowgrpo_jax.estimate --table=docs/estimates.md` and
the arguments in it. With two numbers under rollout and update: what the TPU compiler says,
ahead of time, with no TPU present. With "not compiled" there: by the formulas of
`cost/budget.py`, which are a lower bound (9.1 GB where the compiler says 10.7). Bytes are those
of one device, GB is 10^9; a chip of tpu7x is two devices, and devices are counted. The
floor is the time of an iteration, of each program the slower of computing at 100% of the
device's dense bf16 rate (`cost/flops.py`) and of what travels over its links
(`cost/traffic.py`, `cost/links.py`). Nothing here was run on a TPU.

| arguments | chips | trained | PFLOP an iteration | floor, s | rollout, GB | update, GB | |
|---|---|---|---|---|---|---|---|
"""
_PROGRAMS = ("rollout", "update")
_SHOWN = 5  # choices that --tune prints
_COMPILED = 4  # and at most so many of them are compiled


def main() -> None:
    config = cli.required_config(_CONFIG)
    if _TOPOLOGY.value is None:
        raise UserError("--topology: missing: give chips, such as v5e:2x4")
    if _TUNE.value:
        if _TABLE.value:
            raise UserError(
                "--table: with --tune: give it with the flags that --tune finds"
            )
        tune(config, _TOPOLOGY.value)
        return
    work, chip, why_not = workload(config, _TOPOLOGY.value)
    costs = budget.of(work)
    paths = topology.paths(_TOPOLOGY.value, work.mesh)
    print(*describe(config, work, costs, chip, paths), sep="\n")
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
    mesh, why_not = topology.make_mesh(name, specs.mesh_shape(config))
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
        for made in compile_programs(work, costs):
            needed[made.name] = made.bytes
            print(f"compiled        {made.line}", flush=True)
            yield needed, ""
        yield needed, verdict(config, work.mesh, needed, memory)
    except topology.DoesNotFit as refusal:
        yield needed, f"does not fit: {refusal}: {remedy(config, work.mesh)}"


def describe(
    config: ConfigDict,
    work: PolicyWork,
    costs: budget.Budget,
    chip: str,
    paths: Mapping[str, Way],
) -> list[str]:
    """What the formulas say: one line for each question."""
    travels, *routes = budget.links_lines(costs, paths, chip)
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
        f"floor           {budget.floor_line(costs, chip, paths)}",
        *(f"                {line}" for line in on_top(work, costs, chip)),
        f"links           {travels}",
        *(f"                {line}" for line in routes),
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


class Program(NamedTuple):
    """A compiled program: `bytes` of a device with all else that stays there, and time.

    `moved`: what reaches a device in an iteration, None where its HLO is not known;
    `beside`: the share of it that arrives while something is computed; `said`: what the
    formulas say of `moved`.
    """

    name: str
    bytes: float
    seconds: float
    moved: float | None = None
    beside: float = 0.0
    said: float = 0.0

    @property
    def line(self) -> str:
        figures = f"{budget.gigabytes(self.bytes)} ({self.seconds:.0f} s)"
        if self.moved:
            figures += (
                f"; {budget.travelled(self.moved)} travel in its HLO, by the formula "
                f"{budget.travelled(self.said)}; {self.beside:.0%} beside computing"
            )
        return f"{self.name}: {figures}"


def compile_programs(
    work: PolicyWork, costs: budget.Budget, programs: Sequence[str] = _PROGRAMS
) -> Iterator[Program]:
    """What the compiler says of each program."""
    arguments = work.arguments()
    for name in programs:
        begin = time.monotonic()
        made = topology.compiled(getattr(work, name).lower(*arguments[name]))
        needed = made.bytes
        if name == "rollout":  # the optimizer's state and the averages wait meanwhile
            needed += flops.bytes_on_device(work.resident())
            needed -= flops.bytes_on_device(arguments[name][0])
        seconds = time.monotonic() - begin
        said = sum(costs.traffic.by_program[name].values())
        yield Program(name, needed, seconds, *travels(made, work, costs), said)


def travels(
    made: topology.Compiled, work: PolicyWork, costs: budget.Budget
) -> tuple[float | None, float]:
    """Bytes that a program moves to a device, and the share that hides; see Program.

    Rounds of a pack and microbatches that are skipped are known from the plan alone.
    """
    if not made.text:
        return None, 0.0
    _, packed, batch = work.first_iteration()
    packs = len(packed.tables.rounds) // work.mesh.size
    batches = batch.weight.shape[0] * batch.weight.shape[1] / work.mesh.size
    moved = hlo.collectives(
        made.text, costs.rounds.sampling / packs, costs.rounds.learning / batches
    )
    total = sum(one.total for one in moved)
    beside = sum(one.total for one in moved if one.asynchronous)
    return total, beside / total if total else 0.0


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


# -- the cheapest choice ----------------------------------------------------------------


def tune(config: ConfigDict, name: str) -> None:
    """Prints choices by formula, what compilers say of the best, and flags to paste."""
    work, chip, why_not = workload(config, name)
    memory, paths = flops.CHIPS[chip].memory, topology.paths(name, work.mesh)
    given = tuning.carried_out(work, budget.of(work), flops.CHIPS[chip], paths)
    print(f"given           {candidate_line(given)}")
    found = choices.candidates(config, name)
    print(f"by formula      {len(found)} choices fit {memory / flops.GB:.0f} GB")
    for one in found[:_SHOWN]:
        print(f"                {candidate_line(one)}", flush=True)
    best = found[0]
    if why_not:
        print(f"compiled        no: {why_not}")
    else:
        best = confirmed(config, name, found, memory)
    print(
        f"chosen          {given.seconds / best.seconds:.2f} times as fast as what was "
        f"given, by formula\n{best.choice.flags}"
    )


def candidate_line(one: Candidate) -> str:
    """What is chosen and what it costs."""
    choice = one.choice
    return (
        f"microbatch {choice.microbatch}, remat {choice.remat}, fsdp {choice.fsdp}, "
        f"reward_batches {choice.reward_batches}: {one.seconds:.1f} s, "
        f"{one.bytes / flops.GB:.1f} GB by the formulas"
    )


def confirmed(
    config: ConfigDict, name: str, found: Sequence[Candidate], memory: float
) -> Candidate:
    """The first that fits by the compiler; what it says of one corrects the others.

    UserError if none of the first few does.
    """
    taken: dict[str, float] = {}  # of the formula's activations, by remat
    left = list(found)
    for _ in range(_COMPILED):
        left = [one for one in left if expected(one, taken) <= memory]
        if not left:
            break
        one = left.pop(0)
        work, _, _ = workload(choices.with_choice(config, one.choice), name)
        print(f"compiling       {candidate_line(one)}", flush=True)
        try:
            needed = 0.0
            for made in compile_programs(work, one.costs, ("update", "rollout")):
                print(f"compiled        {made.line}", flush=True)
                needed = max(needed, made.bytes)
                if needed > memory:
                    break
        except topology.DoesNotFit:
            needed = 2 * max(memory, expected(one, taken))
        if needed <= memory:
            return one
        activations = one.costs.bytes["activations"]
        taken[one.choice.remat] = 1 + (needed - one.bytes) / activations
    raise UserError(
        f"--tune: {name}: none of the {_COMPILED} best choices fits by the compiler: "
        "take more chips or chips with more memory, a LoRA or a lower resolution"
    )


def expected(one: Candidate, taken: Mapping[str, float]) -> float:
    """Bytes of a choice, its activations as large as others of its `remat` were."""
    extra = taken.get(one.choice.remat, 1.0) - 1.0
    return one.bytes + extra * one.costs.bytes["activations"]


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
