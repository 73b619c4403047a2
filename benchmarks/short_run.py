"""Train two iterations, export, load in diffusers: does the image differ, and is it so told?

Command: python -m benchmarks.short_run   # writes a section of docs/reliability.md
         python -m benchmarks.short_run --rates 0.0003
The commands are run as a user runs them, on a random pipeline of the SD3 family that
diffusers has written (tests/parity/tiny_sd3.py), with the EMA as the configs have it.
Diffusers then draws the prompts of `compare` from the same noise with and without the
exported LoRA, and the run's reward scores both. The exit code is 1 if the two disagree.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline

from benchmarks import sections
from flowgrpo_jax.rewards.jpeg import kilobytes
from flowgrpo_jax.runtime.images import to_uint8
from tests.parity import tiny_sd3

CLEAR = 1e-5  # of the reward: 5 bytes of a JPEG; less is no direction
COMMAND = "python -m benchmarks.short_run"
WORDS = ("open", "stop", "hello", "exit")
IMAGES = 2  # of every prompt
STEPS, GUIDANCE, SIDE, TOKENS = 28, 7.0, 64, 16  # those of `compare`, of the pipeline
RATES = (3e-4, 3e-2)  # Flow-GRPO's, and one whose change shows after two iterations
CONFIG = """from flowgrpo_jax import config as configs

def get_config(arg=None):
    return configs.make(
        arg,
        model={model!r},
        resolution=64,
        max_sequence_length=16,
        dtype="float32",
        microbatch=2,
        embedding_cache={cache!r},
        prompts={prompts!r},
        eval__prompts={prompts!r},
        reward={{"jpeg_compressibility": 1.0}},
        num_iterations=2,
        prompts_per_iteration=2,
        group_size=4,
        sample__num_steps=3,
        sample__eval_num_steps=2,
        eval__images_per_task=4,
        eval__final_images_per_task=4,
        eval__sde=False,
        log__tensorboard=False,
        train__learning_rate={rate},
    )
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    rates = parser.parse_args().rates
    lines = [
        "| learning rate | `compare`: reward, base and tuned | the same pictures | "
        "diffusers: reward, without and with the LoRA | pixels that differ, most |",
        "|---|---|---|---|---|",
    ]
    agree = True
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        tiny_sd3.write_pipeline(model)
        for rate in rates:
            told, seen = measure(Path(folder) / f"{rate:g}", model, rate)
            agree &= agrees(told, seen)
            lines.append(row(rate, told, seen))
            print(lines[-1], flush=True)
            given = " ".join([COMMAND, *sys.argv[1:]])
            sections.write("A short run", given, "\n".join(lines))
    return 0 if agree else 1


def measure(folder: Path, model: Path, rate: float) -> tuple[dict, dict]:
    """(what `compare` says, what diffusers draws) of a run with that learning rate."""
    folder.mkdir()
    prompts = folder / "prompts.txt"
    texts = [f'a sign that says "{word}"' for word in WORDS]
    prompts.write_text("\n".join(texts) + "\n")
    config = folder / "short.py"
    config.write_text(
        CONFIG.format(
            model=str(model), cache=f"{folder}/cache", prompts=str(prompts), rate=rate
        )
    )
    run = f"--workdir={folder}/run"
    command("main", f"--config={config}", run)
    command("export", run, f"--output={folder}/export")
    said = command("compare", run, f"--num_images={IMAGES}")
    return read(said), drawn(model, folder / "export", texts)


def command(name: str, *arguments: str) -> str:
    """The standard output of a command of the package; its failure ends the benchmark."""
    line = [sys.executable, "-m", f"flowgrpo_jax.{name}", *arguments]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout


def read(said: str) -> dict:
    """The figures of `compare`."""
    found = re.search(r"^jpeg_compressibility: (\S+) base, (\S+) tuned", said, re.M)
    same = re.search(r"^(all|\d+ of) (\d+) images are the same", said, re.M)
    count = 0 if not same else int(same[2] if same[1] == "all" else same[1].split()[0])
    assert found, said
    return {"base": float(found[1]), "tuned": float(found[2]), "same": count}


def drawn(model: Path, export: Path, texts: list[str]) -> dict:
    """Diffusers' pictures without and with the LoRA: rewards and what differs."""
    torch.set_num_threads(1)  # matrices of 32 columns: more threads only wait
    pipeline = StableDiffusion3Pipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    base = pictures(pipeline, texts)
    pipeline.load_lora_weights(export)
    tuned = pictures(pipeline, texts)
    before, after = to_uint8(base).astype(int), to_uint8(tuned).astype(int)
    return {
        "base": float(np.mean(-kilobytes(base) / 500)),
        "tuned": float(np.mean(-kilobytes(tuned) / 500)),
        "same": int((before == after).all(axis=(1, 2, 3)).sum()),
        "share": float((before != after).any(axis=-1).mean()),
        "most": int(np.abs(before - after).max()),
    }


def pictures(pipeline, texts: list[str]) -> np.ndarray:
    """Images from the noise that our package gives prompt and member."""
    made = []
    for number, text in enumerate(texts):
        for member in range(IMAGES):
            key = jax.random.key(0)
            for counter in (number, member, 0):
                key = jax.random.fold_in(key, counter)
            noise = jax.random.normal(key, (SIDE // 8, SIDE // 8, 16))
            latents = torch.from_numpy(np.array(noise)).permute(2, 0, 1)[None]
            answer = pipeline(
                text,
                height=SIDE,
                width=SIDE,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                latents=latents,
                max_sequence_length=TOKENS,
                output_type="np",
            )
            made.append(answer.images[0])
    return np.stack(made)


def agrees(told: dict, seen: dict) -> bool:
    """Both differ from the base model; and in the same direction, where it is clear."""
    total = len(WORDS) * IMAGES
    differ = told["same"] < total and seen["same"] < total
    changes = [found["tuned"] - found["base"] for found in (told, seen)]
    clear = max(map(abs, changes)) > CLEAR
    return bool(differ and (not clear or changes[0] * changes[1] > 0))


def row(rate: float, told: dict, seen: dict) -> str:
    total = len(WORDS) * IMAGES
    cells = [
        f"{rate:g}",
        f"{told['base']:.6f}, {told['tuned']:.6f}",
        f"{told['same']} of {total} by `compare`, {seen['same']} by diffusers",
        f"{seen['base']:.6f}, {seen['tuned']:.6f}",
        f"{seen['share']:.0%}, {seen['most']}/255",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
