# %% [markdown]
# # A reward of your own, and how it is gamed
#
# A reward is a function of images and prompts. This notebook writes one, tries it on
# pictures, trains on it, watches the policy exploit it, and mends that.
#
# | needs | takes |
# |---|---|
# | any runtime: TPU, GPU, or two CPU cores as on a laptop; no download but packages | 5 minutes on two CPU cores, two trainings of a minute among them |
#
# The training runs in the process of this notebook. On a TPU that process then holds
# the chips: a command with `!python` could not have them until the kernel is restarted.

# %% tags=["parameters"]
SOURCE = (
    ".."  # what pip installs if the package is missing: a folder, wheel or git+https
)
WORKDIR = "runs/redness"  # of the first run; the second one is beside it
NUM_ITERATIONS = 16  # of each run
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

# %%
import absl.logging
import matplotlib.pyplot as plt
import numpy as np

import flowgrpo_jax
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.rewards.custom import reward
from flowgrpo_jax.runtime import platform
from flowgrpo_jax.runtime.metrics import read_metrics

absl.logging.set_verbosity(absl.logging.ERROR)  # of libraries about themselves
platform.configure()  # as the commands do: a device for each CPU core, a compile cache
plt.rcParams |= {
    "figure.dpi": 80,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

# %% [markdown]
# ## The function
#
# Images are `[n, height, width, 3]` in [0, 1]; it returns one number for each.
# The decorator gives it a name for this process. (`@reward(by="image")` or
# `by="group"`, PIL images, classes that load a network: `docs/rewards.md`.)


# %%
@reward("redness")
def redness(images, prompts):
    """How much redder than anything else the pixels are, on average."""
    red = images[..., 0] - images[..., 1:].max(-1)
    return red.clip(0).mean((1, 2))


# %% [markdown]
# ## On pictures, before anything is trained on it
#
# What the model draws, and pictures whose score we know. Called by its name it is what
# a run calls: checked for one finite number an image.

# %%
config = flowgrpo_jax.config.load("configs/geneval.py")
PROMPTS = [
    "a photo of a circle",
    "a photo of two rings",
    "a photo of a blue square",
    "a photo of a red cross",
    "a photo of a green triangle and a yellow ring",
    "a photo of a purple circle right of a black square",
]
if "model" in OVERRIDES:
    config.model = OVERRIDES["model"]
base = flowgrpo_jax.load(config)
EACH = 8
repeated = [prompt for prompt in PROMPTS for _ in range(EACH)]


def draw(policy):
    """EACH images of every prompt, from the same noise whatever the policy."""
    return policy.sample(repeated, seed=1, num_steps=10, guidance_scale=1.0)


before = draw(base)

asked = flowgrpo_jax.reward("redness")


def scored(images, texts):
    """The score of each image, as a run gets it."""
    prompts = [Prompt(text) for text in texts]
    return np.asarray(asked(images, prompts)["redness"])


size = before.shape[1:]
known = {
    "all red": np.broadcast_to(np.array([1.0, 0.0, 0.0], np.float32), size),
    "white": np.ones(size, np.float32),
    "black": np.zeros(size, np.float32),
    "noise": np.random.default_rng(0).random(size, np.float32),
}
of_known = dict(zip(known, scored(np.stack([*known.values()]), [*known]), strict=True))
scores = scored(before, repeated)

assert of_known["all red"] == 1 and of_known["white"] == of_known["black"] == 0
np.testing.assert_array_equal(scored(before, repeated), scores)  # the same again,
backwards = scored(before[::-1], repeated[::-1])[::-1]  # whatever else is in the batch
np.testing.assert_array_equal(backwards, scores)

# %%
order = np.argsort(-scores)
shown = [(f"{scores[n]:.3f}", before[n]) for n in order[:: len(order) // 9]]
shown += [(f"{name} {of_known[name]:.3f}", image) for name, image in known.items()]
figure, axes = plt.subplots(2, 7, figsize=(10, 3.2))
for axis in axes.flat:
    axis.axis("off")
for axis, (title, image) in zip(axes.flat, shown, strict=False):
    axis.imshow(image, interpolation="nearest")
    axis.set_title(title, fontsize="small")

# %% [markdown]
# ## Is there anything to learn?
#
# Images are compared with the others of their prompt. Where all of a group score alike
# there is no advantage and no gradient; a run tells the share of such groups as
# `zero_std_ratio`.

# %%
by_prompt = scores.reshape(len(PROMPTS), EACH)
for prompt, group in zip(PROMPTS, by_prompt, strict=True):
    print(f"{prompt:50s} mean {group.mean():.3f}, std {group.std():.3f}")

# %%
figure, axis = plt.subplots(figsize=(9, 2.6))
for row, group in enumerate(by_prompt):
    axis.plot(group, np.full(EACH, row), "o", alpha=0.6, color="tab:red")
axis.set(yticks=range(len(PROMPTS)), yticklabels=PROMPTS, xlabel="redness")
axis.invert_yaxis()

# %% [markdown]
# ## Training on it, with monitors
#
# Monitors are measured at evaluations and never optimised. `geneval`, what the picture
# should show, is held out here; `saturation` and `diversity` look at the pixels alone.
# If the reward rises and a monitor gets worse, a line says so. There is no KL to the
# base model (`train.beta` 0), so nothing holds the policy back.

# %%
common = {
    "num_iterations": NUM_ITERATIONS,
    "prompts_per_iteration": 16,
    "monitors": ("diversity", "saturation", "geneval"),
    "sample.eval_num_steps": 10,
    "eval.guidance_scale": 1.0,
    "eval.sde": False,
    "eval.every": max(1, NUM_ITERATIONS // 2),
    "eval.final_images_per_task": 20,
    "train.beta": 0.0,
    "train.ema": False,  # an average of the weights is still behind after minutes
    "train.learning_rate": 3e-4,
    "train.decay_iterations": 0,
    **OVERRIDES,
}


def configured(**changes):
    """The config of a run: GenEval's, `common`, and these changes."""
    config = flowgrpo_jax.config.load("configs/geneval.py")
    config.reward_options = {}
    for key, value in {**common, **changes}.items():
        flowgrpo_jax.config.assign(config, key, value)
    return config


flowgrpo_jax.train(configured(reward={"redness": 1.0}), WORKDIR)

# %%
tuned = flowgrpo_jax.load(WORKDIR)
after = draw(tuned)
print(f"redness {scores.mean():.3f} before, {scored(after, repeated).mean():.3f} after")


# %%
def strips(images):
    """[prompt, height, EACH * width, 3]: the images of a prompt side by side."""
    framed = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.0)
    rows = framed.reshape(len(PROMPTS), EACH, *framed.shape[1:])
    return np.concatenate(np.moveaxis(rows, 1, 0), axis=2)


def beside(**columns):
    """Rows of pictures, a column for each set of images."""
    figure, axes = plt.subplots(
        len(PROMPTS), len(columns), figsize=(11, 1.1 * len(PROMPTS)), squeeze=False
    )
    for column, (name, images) in enumerate(columns.items()):
        for axis, strip, prompt in zip(
            axes[:, column], strips(images), PROMPTS, strict=True
        ):
            axis.imshow(strip, interpolation="nearest")
            axis.set_title(f"{prompt}: {name}", fontsize="x-small")
            axis.axis("off")


beside(before=before, after=after)

# %% [markdown]
# The reward is up, and the pictures are red whatever was asked for: the function never
# looks at the prompt. That is not the fault of the training, it is what was rewarded.
#
# ## The remedy
#
# Reward what must not be lost, too. Rewards of different units are compared within
# their groups one by one, and their advantages added (`reward_combination`).

# %%
both = {"geneval": 1.0, "redness": 0.3}
second = configured(
    reward=both,
    monitors=("diversity", "saturation"),
    **{"train.reward_combination": "advantage"},
)
flowgrpo_jax.train(second, f"{WORKDIR}_and_geneval")

# %%
mended = flowgrpo_jax.load(f"{WORKDIR}_and_geneval")
third = draw(mended)
runs = {"redness": WORKDIR, "redness and geneval": f"{WORKDIR}_and_geneval"}
evaluations = {
    name: [row for row in read_metrics(path) if row["kind"] == "eval"]
    for name, path in runs.items()
}
for name, rows in evaluations.items():
    for key in ("eval_reward_redness", "eval_reward_geneval", "eval_saturation"):
        print(f"{name:20s} {key:20s} {rows[0][key]:.3f} -> {rows[-1][key]:.3f}")

# %%
figure, axes = plt.subplots(1, 4, figsize=(11, 2.8))
for axis, name in zip(
    axes, ("reward_redness", "reward_geneval", "saturation", "diversity"), strict=True
):
    for (run, rows), color in zip(
        evaluations.items(), ("tab:red", "tab:blue"), strict=True
    ):
        # The first and the last evaluation are of all held-out prompts.
        ends = [rows[0], rows[-1]]
        values = [row[f"eval_{name}"] for row in ends]
        axis.plot(["before", "after"], values, "o-", color=color, label=run)
    axis.set_title(name, fontsize="medium")
    axis.margins(x=0.3)
axes[0].legend(frameon=False, fontsize="x-small")

beside(redness=after, both=third)

# %% [markdown]
# ## To keep it
#
# A name that a cell has registered is gone with the kernel. In a file beside your runs,
# `my_rewards.py`, the function needs no decorator, and a config names it by its path:
#
# ```python
# reward = {"geneval": 1.0, "my_rewards.redness": 0.3}
# ```
#
# Then `python -m flowgrpo_jax.evaluate --workdir=...` finds it again, too. A reward that
# is slow or needs another machine runs on a server (`docs/rewards.md`), one that fails
# stops the run with a line, and the same command goes on from there.
