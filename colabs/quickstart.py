# %% [markdown]
# # Quickstart: tune an image model with rewards
#
# A small text-to-image model that ships in the package draws what a prompt asks for
# about half of the time (without guidance). Flow-GRPO lets it learn from its own
# pictures and their rewards, for two minutes.
#
# | needs | takes |
# |---|---|
# | any runtime: TPU, GPU, or two CPU cores as on a laptop; no download but packages | 5 minutes on two CPU cores, 2 of them training |
#
# The training runs in the process of this notebook. On a TPU that process then holds
# the chips: a command with `!python` could not have them until the kernel is restarted.
# (The outputs are of two CPU cores that other work kept busy, hence the times in them.)

# %% tags=["parameters"]
SOURCE = (
    ".."  # what pip installs if the package is missing: a folder, wheel or git+https
)
WORKDIR = "runs/quickstart"  # all that the run writes; with the same one it goes on
NUM_ITERATIONS = 30
OVERRIDES = {}  # more values of the config by key, such as {"train.learning_rate": 2e-4}

# %%
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("flowgrpo_jax") is None:
    extra = "cuda" if shutil.which("nvidia-smi") else "notebooks"
    if [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")]:
        extra = "tpu"
    where = SOURCE if "://" in SOURCE else Path(SOURCE).resolve().as_uri()
    what = f"flowgrpo_jax[{extra},notebooks] @ {where}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", what], check=True)

# %% [markdown]
# ## What this runtime is, and what fits on it

# %%
import html
import os

import absl.logging
import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display

import flowgrpo_jax
from flowgrpo_jax import assemble
from flowgrpo_jax.cost import budget
from flowgrpo_jax.runtime import mesh, platform
from flowgrpo_jax.runtime.metrics import read_metrics

absl.logging.set_verbosity(absl.logging.ERROR)  # of libraries about themselves
platform.configure()  # as the commands do: a device for each CPU core, a compile cache
plt.rcParams |= {
    "figure.dpi": 80,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

device = jax.devices()[0]
if device.platform == "cpu":
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
else:
    memory = device.memory_stats()["bytes_limit"]
print(f"{jax.device_count()} x {device.device_kind}, {memory / 1e9:.0f} GB, ", end="")
print(f"jax {jax.__version__}")

# %% [markdown]
# The embedded model fits anywhere. What large ones need to train a LoRA, with small
# batches, by the formulas that a run prints before it starts (what a compiler says is
# half more: `python -m flowgrpo_jax.estimate` asks it, `docs/estimates.md`):

# %%
for model in ("sd3.5-medium", "flux.1-dev"):
    large = flowgrpo_jax.config.load(f"configs/geneval.py:model={model}")
    large.prompts_per_iteration, large.group_size, large.updates_per_iteration = 4, 8, 1
    large.microbatch, large.remat = 2, "full"
    one_device = mesh.make_abstract_mesh({"data": 1}, 1)
    work = assemble.make_policy_work(large, one_device, *assemble.abstract_model(large))
    needed = sum(budget.of(work).bytes.values())
    verdict = "may fit" if needed < memory else "does not fit on one of these devices"
    print(f"{model:13s} at least {needed / 1e9:4.1f} GB: {verdict}")

# %% [markdown]
# On a CPU "fits" says nothing of the time: these models need an accelerator.
#
# ## The run
#
# A config is a file of `configs/`, here GenEval: prompts about objects, counts, colours
# and places, and a detector that checks the picture. `:recipe=...` chooses one of the
# algorithms; the rest are values that a task or a recipe leaves open.

# %%
config = flowgrpo_jax.config.load("configs/geneval.py:recipe=flow_grpo_fast_v1")
changes = {
    "num_iterations": NUM_ITERATIONS,
    "prompts_per_iteration": 16,
    "train.learning_rate": 3e-4,
    "train.decay_iterations": NUM_ITERATIONS // 3,
    "train.ema": False,  # an average of the weights is still behind after minutes
    "sample.eval_num_steps": 10,
    "eval.guidance_scale": 1.0,
    "eval.every": NUM_ITERATIONS,
    "eval.sde": False,
    "eval.final_images_per_task": 20,
    **OVERRIDES,
}
for key, value in changes.items():
    flowgrpo_jax.config.assign(config, key, value)

recipe = flowgrpo_jax.recipes[config.recipe]
print(f"{recipe.paper}: {recipe.when}")

# %% [markdown]
# What the model draws before, from noise that we keep for later:

# %%
PROMPTS = [
    "a photo of four circles",
    "a photo of a red triangle and a blue ring",
    "a photo of a purple cross below a yellow square",
    "a photo of a green ring",
    "a photo of three squares",
]
COLUMNS = 6


def draw(policy):
    """A strip of COLUMNS pictures for each prompt, [prompt, height, width, 3]."""
    repeated = [prompt for prompt in PROMPTS for _ in range(COLUMNS)]
    images = policy.sample(repeated, seed=1)
    framed = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.0)
    rows = framed.reshape(len(PROMPTS), COLUMNS, *framed.shape[1:])
    return np.concatenate(np.moveaxis(rows, 1, 0), axis=2)


before = draw(flowgrpo_jax.load(config))

# %%
flowgrpo_jax.train(config, WORKDIR)

# %% [markdown]
# The stop button saves first; running the cell again goes on from there, also in a new
# kernel. A finished run says so.
#
# ## Before and after
#
# The same prompts from the same noise:

# %%
tuned = flowgrpo_jax.load(WORKDIR)
after = draw(tuned)
print(tuned)

# %%
figure, axes = plt.subplots(len(PROMPTS), 2, figsize=(10, 1.2 * len(PROMPTS)))
for row, prompt in enumerate(PROMPTS):
    for axis, strip, which in zip(
        axes[row], (before[row], after[row]), ("before", "after"), strict=True
    ):
        axis.imshow(strip, interpolation="nearest")
        axis.set_title(f"{prompt}: {which}", fontsize="small")
        axis.axis("off")

# %% [markdown]
# ## Curves
#
# Everything that was measured is in `metrics.jsonl`: a row for each iteration, and one
# for each evaluation on prompts that were held out.

# %%
rows = read_metrics(WORKDIR)
train = [row for row in rows if row["kind"] == "train"]
first, last = ([row for row in rows if row["kind"] == "eval"][n] for n in (0, -1))
tasks = [
    name.removeprefix("eval_").removesuffix("_accuracy")
    for name in first
    if name.endswith("_accuracy") and not name.startswith(("eval_un", "eval_reward"))
]
for name in tasks:
    key = f"eval_{name}_accuracy"
    print(f"{name:14s} {first[key]:6.1%} before, {last[key]:6.1%} after")

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2))
iterations = [row["iteration"] for row in train]
left.plot(iterations, [row["reward_avg"] for row in train])
left.set(title="reward of the pictures it learns from", xlabel="iteration")
kl = [row.get("kl_loss", np.nan) for row in train]  # none where nothing was learned
middle.plot(iterations, kl, color="tab:green")
middle.set(title="KL penalty: distance from the base model", xlabel="iteration")
place = np.arange(len(tasks))
for shift, scores, name in ((-0.2, first, "before"), (0.2, last, "after")):
    heights = [scores[f"eval_{task}_accuracy"] for task in tasks]
    right.bar(place + shift, heights, width=0.4, label=name)
right.set(title="accuracy on held-out prompts", ylim=(0, 1))
right.set_xticks(place, tasks, rotation=30, ha="right")
_ = right.legend(frameon=False, fontsize="small")

# %% [markdown]
# ## The report
#
# `report.html` has all of this and more, in one file that loads nothing:

# %%
page = html.escape((Path(WORKDIR) / "report.html").read_text())
style = "width: 100%; height: 700px; border: 0"
display(HTML(f'<div><iframe srcdoc="{page}" style="{style}"></iframe></div>'))

# %% [markdown]
# ## How to go on
#
# - Longer: a larger `NUM_ITERATIONS` and another `WORKDIR`. The full run of
#   `configs/geneval.py` takes 400 iterations, 63% to 94% (`docs/results.md`).
# - Another algorithm: `flowgrpo_jax.config.load("configs/geneval.py:recipe=g2rpo")`;
#   `flowgrpo_jax.recipes` is the table, `how_it_works` shows what they do.
# - A reward of your own: the notebook `your_reward`.
# - Stable Diffusion 3.5 on a TPU: the notebook `sd35_lora_tpu`.
# - In a shell the same run is
#   `python -m flowgrpo_jax.main --config=configs/geneval.py:recipe=flow_grpo_fast_v1`,
#   and `python -m flowgrpo_jax.sample`, `evaluate` and `compare` read its workdir.
