# %% [markdown]
# # Stable Diffusion 3.5 medium, a LoRA, one TPU chip
#
# Flow-GRPO-Fast on the released weights, on a runtime of a single chip, in parts: a
# runtime that disconnects costs the minutes since the last checkpoint.
#
# | needs | takes |
# |---|---|
# | a TPU runtime (v5e-1 or v6e-1) or a GPU of 24 GB or more; 20 GB of disk; a token of Hugging Face whose account has accepted the licence on the [model's page](https://huggingface.co/stabilityai/stable-diffusion-3.5-medium) | a download of 16 GB, then hours: the cell `estimate` says how long an iteration takes at least |
#
# **What has been run:** all cells, in this order, on a CPU, on a pipeline folder of
# random weights and 64 x 64 pixels that diffusers wrote. The outputs below are of that,
# so their pictures show nothing. The released weights and a TPU have not been run by us.
#
# Everything here is a command in a process of its own. **The kernel must leave the chip
# alone**: whoever calls `jax.devices()` in a cell takes the TPU, and no command gets it
# until the kernel is restarted.

# %% tags=["parameters"]
SOURCE = (
    ".."  # what pip installs if the package is missing: a folder, wheel or git+https
)
MODEL = "stabilityai/stable-diffusion-3.5-medium"  # or a folder that diffusers wrote
TOPOLOGY = "v5e:1x1"  # what is estimated for; or v6e:1x1, H100:1
REWARD = "ocr"  # is the text there? or "jpeg_compressibility", which asks no network
# Where all goes. On Colab a folder of Drive, "/content/drive/MyDrive/sd35"; elsewhere a
# disk that outlives the machine, or a bucket that is mounted (gcsfuse).
HOME = "runs/sd35"
RESOLUTION = 512
TRIAL, NUM_ITERATIONS = 4, 200  # iterations of the first part, and of all
MORE = []  # more flags of the config, such as "--config.train.learning_rate=1e-4"
COMPARED = ["--max_prompts=4", "--num_images=2"]  # flags of the comparison at the end

# %%
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

IN_COLAB = "google.colab" in sys.modules
if importlib.util.find_spec("flowgrpo_jax") is None:
    extra = "cuda" if shutil.which("nvidia-smi") else "tpu"
    where = SOURCE if "://" in SOURCE else Path(SOURCE).resolve().as_uri()
    what = f"flowgrpo_jax[{extra},ocr,notebooks] @ {where}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", what], check=True)
if IN_COLAB and HOME.startswith("/content/drive"):
    from google.colab import drive

    drive.mount("/content/drive")
WORKDIR, EXPORT = f"{HOME}/run", f"{HOME}/export"

# %% [markdown]
# ## Token
#
# From the environment (`HF_TOKEN`), from Colab's secrets (the key in the side bar), or
# typed in. A folder needs none.

# %%
import getpass
import os

if not Path(MODEL).is_dir():
    from huggingface_hub import get_token

    if get_token() is None and IN_COLAB:
        from google.colab import userdata

        os.environ["HF_TOKEN"] = userdata.get("HF_TOKEN")
    if get_token() is None:
        os.environ["HF_TOKEN"] = getpass.getpass("Hugging Face token: ")

# %% [markdown]
# ## Prompts and flags
#
# Signs with a word, in double quotes: the reward `ocr` reads what stands there. The
# authors' own prompts are in `dataset/ocr` of
# [their repository](https://github.com/yifan123/flow_grpo).

# %%
PLACES = ("wooden sign", "shop window", "coffee mug", "birthday cake", "book cover")
WORDS = """open closed hello welcome danger coffee bakery museum garden summer winter
station platform library chapter ticket harbor silence wonder forever""".split()
lines = [f'a {place} that says "{word}"\n' for word in WORDS for place in PLACES]
Path("prompts.txt").write_text("".join(lines[:-10]))
Path("held_out.txt").write_text("".join(lines[-10:]))

FLAGS = [
    f"--config=configs/ocr.py:model={MODEL},recipe=flow_grpo_fast",
    "--config.prompts=prompts.txt",
    "--config.eval.prompts=held_out.txt",
    f"--config.reward={{'{REWARD}': 1.0}}",
    f"--config.resolution={RESOLUTION}",
    f"--config.embedding_cache={HOME}/embeddings",
    "--config.prompts_per_iteration=8",
    "--config.group_size=16",
    "--config.updates_per_iteration=1",
    "--config.microbatch=2",  # images in the network at once, and
    "--config.remat=full",  # what they keep for the gradient: memory of 16 GB
    "--config.eval.every=50",
    "--config.eval.images_per_task=10",
    "--config.eval.final_images_per_task=10",
    "--config.checkpoint.minutes=10",
    *MORE,
]


def run(command, *flags):
    """A command of the package, its lines as they come; an error where it fails.

    The stop button reaches it once: a training then saves and ends.
    """
    words = [sys.executable, "-m", f"flowgrpo_jax.{command}", *flags]
    print("$ python", *words[1:], flush=True)
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        while process.poll() is None:
            try:
                for line in process.stdout:
                    print(line, end="", flush=True)
            except KeyboardInterrupt:
                process.terminate()
    if process.returncode:
        raise RuntimeError(f"{command}: exit code {process.returncode}")


# %% [markdown]
# ## What it costs, and whether it fits
#
# By formula, and where libtpu is installed also by the TPU's compiler (some minutes),
# which needs no chip.

# %%
run("estimate", *FLAGS, f"--topology={TOPOLOGY}")

# %% [markdown]
# ## Some iterations, to see that it works
#
# The first start downloads the model, and encodes every prompt once with the text
# encoders, which are then freed: T5-XXL and the transformer are never in memory
# together. Then it evaluates, compiles, and goes through the first iterations.

# %%
run("main", *FLAGS, f"--workdir={WORKDIR}", f"--config.num_iterations={TRIAL}")

# %%
cached = [file for file in Path(HOME, "embeddings").rglob("*") if file.is_file()]
size = sum(file.stat().st_size for file in cached)
print(f"embedding cache: {size / 1e6:.1f} MB in {len(cached)} files, made once")

# %% [markdown]
# ## The run, and going on after a disconnect
#
# The same command with the same workdir goes on from the newest checkpoint: here from
# where the trial ended. After a disconnect, run all cells from the top on a new
# runtime: the trial says that it is finished, and this cell goes on. What a run
# depends on is checked, so that no other prompts or weights slip in.

# %%
run("main", *FLAGS, f"--workdir={WORKDIR}", f"--config.num_iterations={NUM_ITERATIONS}")

# %%
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display
from PIL import Image
from safetensors.numpy import load_file

from flowgrpo_jax.runtime.metrics import read_metrics

rows = read_metrics(WORKDIR)
train = [row for row in rows if row["kind"] == "train"]
held_out = [row for row in rows if row["kind"] == "eval"]
print(f"{len(train)} iterations, {len(held_out)} evaluations")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), dpi=80)
for axis, name, title in (
    (left, "reward_avg", "reward"),
    (right, "grad_norm", "norm of the gradient"),
):
    axis.plot([row["iteration"] for row in train], [row[name] for row in train], "o-")
    axis.set(title=f"{title} of training", xlabel="iteration")
scores = [row["eval_reward_avg"] for row in held_out]
left.plot([row["iteration"] for row in held_out], scores, "s--", label="held out")
left.legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# The same noise before and after:

# %%
sheets = sorted(Path(WORKDIR, "samples").glob("iteration_*.png"))
figure, axes = plt.subplots(2, 1, figsize=(8, 3.2), dpi=80)
for axis, path in zip(axes, (sheets[0], sheets[-1]), strict=True):
    sheet = Image.open(path)
    side = sheet.width // 12  # a sheet has 12 columns: the first 6 pictures
    axis.imshow(sheet.crop((0, 0, 6 * side, side)))
    axis.set_title(path.stem.replace("_", " "), fontsize="small")
    axis.axis("off")
figure.tight_layout()

# %% [markdown]
# ## Compare
#
# Base and tuned side by side on prompts that were held out, unless `COMPARED` says
# otherwise as diffusers' pipeline samples: 28 steps, guidance 7.

# %%
run("compare", f"--workdir={WORKDIR}", *COMPARED)

# %%
import html

page = html.escape(Path(WORKDIR, "compare.html").read_text())
style = "width: 100%; height: 600px; border: 0"
display(HTML(f'<div><iframe srcdoc="{page}" style="{style}"></iframe></div>'))

# %% [markdown]
# ## Export

# %%
run("export", f"--workdir={WORKDIR}", f"--output={EXPORT}")

# %%
lora = load_file(f"{EXPORT}/pytorch_lora_weights.safetensors")
up = {name: np.abs(value).max() for name, value in lora.items() if "lora_B" in name}
print(f"{sum(size > 0 for size in up.values())} of {len(up)} matrices B have moved")
assert any(size > 0 for size in up.values())

# %% [markdown]
# In diffusers, anywhere:
#
# ```python
# pipeline = StableDiffusion3Pipeline.from_pretrained(MODEL, torch_dtype=torch.bfloat16)
# pipeline.load_lora_weights("export")
# pipeline('a book cover that says "wonder"').images[0].save("wonder.png")
# ```
#
# More: `docs/sd3.md` (what learns, what is read from the folder), `docs/rewards.md`
# (other rewards), `docs/estimates.md` (other chips).
