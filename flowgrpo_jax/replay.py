"""Makes a training sample of a run again, bit for bit: every step's picture and log-prob.

python -m flowgrpo_jax.replay --workdir=DIR --iteration=812 --prompt=3 --member=5

It goes on from the nearest checkpoint before that iteration, which it runs again with
those between, and compares them with the rows of the run. The run is not touched.
Exit code 1 where anything is known to differ from what the run had.
"""

import hashlib
import io
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from flowgrpo_jax import cli
from flowgrpo_jax.errors import UserError

if TYPE_CHECKING:
    from flowgrpo_jax.assemble.replay import Replayed
    from flowgrpo_jax.engine.trajectory import Leaf, Step

FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", FLAGS)
_ITERATION = flags.DEFINE_integer(
    "iteration", None, "Which iteration of the run, from 0.", flag_values=FLAGS
)
_PROMPT = flags.DEFINE_integer(
    "prompt", 0, "Which prompt of the iteration, from 0.", flag_values=FLAGS
)
_MEMBER = flags.DEFINE_integer(
    "member", 0, "Which image of the prompt's group, from 0.", flag_values=FLAGS
)
_CHECKPOINT = flags.DEFINE_integer(
    "checkpoint",
    None,
    "Go on from this one, by its finished iterations, 0 for the beginning; by default "
    "the nearest.",
    flag_values=FLAGS,
)
_MESH = flags.DEFINE_string(
    "mesh",
    None,
    "Devices, such as data=2,fsdp=1; by default the mesh of the run. Another one gives "
    "the same samples of the same weights; updates add up in another order.",
    FLAGS,
)
_MODEL = flags.DEFINE_string(
    "model", None, "Where the run's base model is now, if it has been moved.", FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Folder for the files; by default replayed/<run>/<iteration>_<prompt>_<member> "
    "here.",
    FLAGS,
)
_WIDE = 150  # pixels of a picture on the sheet, for its caption
DIFFERS = 1


def main() -> int:
    from flowgrpo_jax.assemble.replay import Place, replay

    if _WORKDIR.value is None:
        raise UserError("--workdir: missing: give the folder of a run")
    if _ITERATION.value is None:
        raise UserError("--iteration: missing: give a number, from 0")
    place = Place(_ITERATION.value, _PROMPT.value, _MEMBER.value)
    if _OUTPUT.value is not None:  # fail before the work, not after it
        cli.writable_folder(Path(_OUTPUT.value), "--output")
    replayed = replay(
        _WORKDIR.value,
        place,
        checkpoint=_CHECKPOINT.value,
        mesh=mesh_of(_MESH.value),
        model=_MODEL.value,
    )
    print(table(replayed))
    run = Path(_WORKDIR.value).expanduser().absolute().name
    default = Path("replayed") / run / "_".join(map(str, place))
    folder = cli.writable_folder(Path(_OUTPUT.value or default), "--output")
    write(folder, replayed)
    print(f"steps.png, image.png, sample.json and sample.npz in {folder}")
    if replayed.differs:
        print(
            "warning: not what the run had: see DIFFERS above; a mesh, an environment "
            "or a reward that is another one explains it",
            file=sys.stderr,
        )
        return DIFFERS
    return 0


def mesh_of(text: str | None) -> dict[str, int] | None:
    """The value of --mesh: `data=2,fsdp=1` by axis; UserError for anything else."""
    if text is None:
        return None
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name.strip(): int(size) for name, size in pairs}
    except ValueError as error:
        raise UserError(
            f"--mesh: {text}: must be axes with their sizes: data=2,fsdp=1"
        ) from error


def table(replayed: "Replayed") -> str:
    """A line for each step and for what the image got."""
    sample, place = replayed.sample, replayed.place
    title = f"iteration {place.iteration}, prompt {place.prompt}, member {place.member}"
    lines = [
        f"{title}: {sample.prompt.text}",
        f"{'step':>7} {'sigma':>17} {'kind':>13} {'log-prob':>14} {'advantage':>14}",
    ]
    for step in sample.steps:
        ways = f"{step.start}-{step.stop}"
        sigmas = f"{step.sigma:.4f}-{step.sigma_next:.4f}"
        numbers = [_digits(step.log_prob), _digits(step.advantage)]
        lines.append(
            f"{ways:>7} {sigmas:>17} {_kind(step):>13} "
            + " ".join(f"{text:>14}" for text in numbers)
        )
    if not any(step.stochastic for step in sample.steps):
        lines.append("no step is stochastic: there are no log-probs")
    if not any(step.trained for step in sample.steps):
        lines.append(
            f"its image is learned from: advantage {_digits(sample.advantage)}"
        )
    lines.append(f"rewards: {_rewards(sample.leaf)}")
    group = sample.group
    lines.append(
        f"of its group of {len(group)}: mean {np.mean(group):.6g}, from "
        f"{np.min(group):.6g} to {np.max(group):.6g}"
    )
    for other in sample.others:
        lines.append(f"its steps also answer for {_name(other)}: {_rewards(other)}")
    if sample.unequal:
        lines.append(f"sampled alone DIFFERS: {'; '.join(sample.unequal)}")
    else:
        lines.append("sampled alone: the same bits as in its iteration")
    return "\n".join(lines)


def write(folder: Path, replayed: "Replayed") -> None:
    """Write steps.png, image.png, sample.json and sample.npz."""
    from flowgrpo_jax.runtime import images as grids
    from flowgrpo_jax.runtime.workdir import atomic_write

    sample = replayed.sample
    steps, image = sample.steps, sample.leaf.image
    white = np.ones_like(image)
    shown = [step.picture for step in steps] + [image]
    shown += [step.predicted for step in steps] + [white]
    captions = [_caption(step) for step in steps] + [_rewards(sample.leaf)]
    captions += [f"{step.start}: where it leads" for step in steps] + [""]
    shown += [other.image for other in sample.others]
    captions += [f"{_name(other)}: {_rewards(other)}" for other in sample.others]
    columns, scale = len(steps) + 1, -(-_WIDE // image.shape[1])
    grids.save_grid(folder / "steps.png", np.stack(shown), columns, scale, captions)
    atomic_write(folder / "image.png", grids.png(image))
    arrays: dict[str, np.ndarray] = {
        "latents": np.stack([*(step.latent for step in steps), sample.clean]),
        "velocities": np.stack([step.velocity for step in steps]),
        "pictures": np.stack([*(step.picture for step in steps), image]),
        "predicted": np.stack([step.predicted for step in steps]),
        "others": np.stack([other.image for other in sample.others] or [white])[
            : len(sample.others)
        ],
        "log_probs": np.array([_or_nan(step.log_prob) for step in steps], np.float32),
        "advantages": np.array([_or_nan(step.advantage) for step in steps], np.float32),
        "sigmas": np.array([steps[0].sigma, *(step.sigma_next for step in steps)]),
    }
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    atomic_write(folder / "sample.npz", buffer.getvalue())
    told = record(replayed) | {
        "sha256": {name: _sha256(values) for name, values in arrays.items()}
    }
    atomic_write(folder / "sample.json", json.dumps(told, indent=2) + "\n")


def record(replayed: "Replayed") -> dict[str, Any]:
    """All numbers of a replay, as JSON has them: None for one that is not there."""
    sample = replayed.sample
    return {
        **replayed.place._asdict(),
        "text": sample.prompt.text,
        "rewards": _plain(sample.leaf.rewards),
        "advantage": sample.advantage,
        "group": [_finite(value) for value in sample.group.tolist()],
        "steps": [
            {
                "start": step.start,
                "stop": step.stop,
                "sigma": step.sigma,
                "sigma_next": step.sigma_next,
                "kind": _kind(step),
                "log_prob": _finite(step.log_prob),
                "advantage": step.advantage,
                "answers_for": [leaf for leaf in step.answers_for if leaf >= 0],
            }
            for step in sample.steps
        ],
        "leaf": sample.leaf.number,
        "others": [
            {
                "leaf": other.number,
                "member": other.member,
                "rewards": _plain(other.rewards),
            }
            for other in sample.others
        ],
        "checkpoint": replayed.checkpoint,
        "differs": replayed.differs,
        "unequal": list(sample.unequal),
        "rows": [
            {
                "iteration": one.iteration,
                "equal": one.equal,
                "differing": {
                    name: [_finite(value) for value in pair]
                    for name, pair in one.differing.items()
                },
                "learned": {
                    name: [_finite(value) for value in pair]
                    for name, pair in one.learned.items()
                },
            }
            for one in replayed.checked
        ],
        "environments": list(replayed.environments),
    }


def _kind(step: "Step") -> str:
    if step.trained:
        return "trained"
    return "stochastic" if step.stochastic else "deterministic"


def _caption(step: "Step") -> str:
    told = f"{step.start}: sigma {step.sigma:.3g}"
    if step.log_prob is not None:
        told += f" log-prob {step.log_prob:.4g}"
    return told + (f" advantage {step.advantage:.3g}" if step.advantage else "")


def _name(leaf: "Leaf") -> str:
    return f"image {leaf.number}" if leaf.member is None else f"member {leaf.member}"


def _rewards(leaf: "Leaf") -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in leaf.rewards.items())


def _digits(value: float | None) -> str:
    """As few digits as give the same float32 again."""
    return "-" if value is None else str(np.float32(value))


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _plain(rewards: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in rewards.items()}


def _sha256(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


if __name__ == "__main__":
    cli.run(main, FLAGS)
