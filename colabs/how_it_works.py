# %% [markdown]
# # How it works: Flow-GRPO and G2RPO in numbers
#
# For whoever has read the papers ([Flow-GRPO](https://arxiv.org/abs/2505.05470),
# [G2RPO](https://arxiv.org/abs/2510.01982)) and wants to see their formulas at work.
# An "image" is two numbers here, so that all of it can be drawn; what computes it are
# the functions that train large models. Every picture is made of what the cell above
# it has computed.
#
# | needs | takes |
# |---|---|
# | any runtime, no accelerator, no download but packages | a minute or two |
#
# It computes on the CPU even where there is an accelerator, so it may run beside a
# notebook that trains.

# %% tags=["parameters"]
SOURCE = (
    ".."  # what pip installs if the package is missing: a folder, wheel or git+https
)
SAMPLES = 4000  # of each flow in section 1
ITERATIONS = 30  # of each training in section 5

# %%
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("flowgrpo_jax") is None:
    where = SOURCE if "://" in SOURCE else Path(SOURCE).resolve().as_uri()
    what = f"flowgrpo_jax[notebooks] @ {where}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", what], check=True)

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import flowgrpo_jax
from flowgrpo_jax.assemble import specs
from flowgrpo_jax.engine import credit
from flowgrpo_jax.engine.planner import Planner
from flowgrpo_jax.flow import packing, plan, rollout, schedule
from flowgrpo_jax.rl import advantage, divergence, likelihood
from flowgrpo_jax.rl.objectives.clipping import Clip, clipped_surrogate

jax.config.update("jax_platforms", "cpu")
ODE, SDE, RED, GREEN = "tab:blue", "tab:orange", "tab:red", "tab:green"
plt.rcParams |= {
    "figure.dpi": 80,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "legend.frameon": False,
}

# %% [markdown]
# ## 1. A flow of two numbers: one ODE, one SDE, the same marginals
#
# A latent at `sigma` is `(1 - sigma) * data + sigma * noise`: data at 0, noise at 1.
# The data are an equal mixture of Gaussians around `MODES`, so the velocity, which a
# network would have to learn, is known in closed form.
#
# The ODE follows the velocity and has no randomness after the first noise, so there is
# nothing to explore and no probability to change. Flow-GRPO (eq. 7 to 9) replaces it by
# an SDE: it adds fresh noise, and a pull that makes up for it, so that at every sigma
# the latents are distributed as before.

# %%
STD = 0.25
MODES = jnp.array([[-1.0, -0.5], [1.0, 0.5]])


def velocity(modes, latents, sigma):
    """E[noise - data | latent] of latents [n, 1, 1, 2] at sigmas [n]."""
    t = sigma[:, None, None]
    away = latents.reshape(-1, 1, 2) - (1 - t) * modes  # [n, mode, 2]
    variance = (1 - t) ** 2 * STD**2 + t**2
    distance = (away**2).sum(-1, keepdims=True) / (2 * variance)
    share = jax.nn.softmax(-distance, axis=1)  # of each mode in this latent
    of_mode = (t - (1 - t) * STD**2) / variance * away - modes
    return (share * of_mode).sum(1).reshape(latents.shape)


def sampler_of(num_steps, noise_level=0.7):
    sigmas = tuple(schedule.shifted(num_steps, shift=3.0).tolist())
    return rollout.Sampler(velocity, sigmas, kind="sde", noise_level=noise_level)


def ways(sampler, count, stochastic, seed=0):
    """Latents [node, sample, 2] from noise to data; 0.0 is the ODE, 1.0 the SDE."""
    sigmas, draw = jnp.array(sampler.sigmas), jax.jit(rollout.draw, static_argnums=0)
    keys = jax.random.split(jax.random.key(seed), sampler.num_steps + 1)
    fresh = jax.vmap(lambda key: jax.random.normal(key, (count, 1, 1, 2)))(keys)
    latents, switch = [fresh[0]], jnp.full(count, stochastic)
    for number in range(sampler.num_steps):
        step = jnp.full(count, number)
        drift = velocity(MODES, latents[-1], sigmas[step])
        noise = fresh[number + 1]
        latents.append(draw(sampler, latents[-1], drift, noise, step, step + 1, switch))
    return np.stack(latents).reshape(-1, count, 2)


def exact(x, sigma):
    """The density of the first number at this sigma."""
    spread = np.sqrt((1 - sigma) ** 2 * STD**2 + sigma**2)
    away = (x[:, None] - (1 - sigma) * np.asarray(MODES)[:, 0]) / spread
    return np.exp(-(away**2) / 2).mean(1) / (spread * np.sqrt(2 * np.pi))


fine = sampler_of(40)
by_ode, by_sde = (ways(fine, SAMPLES, stochastic) for stochastic in (0.0, 1.0))

# %%
figure, axes = plt.subplots(2, 4, figsize=(11, 5.4), height_ratios=[1.2, 1])
for half, latents, name, color in (
    (0, by_ode, "ODE", ODE),
    (1, by_sde, "SDE", SDE),
):
    spec = axes[0, 2 * half].get_gridspec()
    for covered in axes[0, 2 * half : 2 * half + 2]:
        covered.remove()
    axis = figure.add_subplot(spec[0, 2 * half : 2 * half + 2])
    axis.plot(fine.sigmas, latents[:, :12, 0], color=color, lw=1, alpha=0.8)
    axis.set(xlim=(1, 0), ylim=(-3, 3), xlabel="sigma", ylabel="first number")
    axis.set_title(f"{name}: 12 ways from the same 12 noises")
grid = np.linspace(-3.5, 3.5, 200)
for axis, wanted in zip(axes[1], (0.95, 0.75, 0.45, 0.0), strict=True):
    node = int(np.argmin(np.abs(np.array(fine.sigmas) - wanted)))
    for latents, name, color in ((by_ode, "ODE", ODE), (by_sde, "SDE", SDE)):
        axis.hist(
            latents[node, :, 0],
            bins=60,
            range=(-3.5, 3.5),
            density=True,
            histtype="step",
            lw=1.4,
            color=color,
            label=name,
        )
    axis.plot(grid, exact(grid, fine.sigmas[node]), "k--", lw=1, label="exact")
    axis.set(title=f"at sigma {fine.sigmas[node]:.2f}", yticks=[])
    axis.set_xlabel("first number")
_ = axes[1, 0].legend(fontsize="small")

# %% [markdown]
# That holds for small steps, and the trainer takes few. Below: the largest difference
# between the distribution functions of the first number, sampled and exact, for both
# solvers. What is off by more than an exact sampler would be is the price of the steps.

# %%
# The mean of Kolmogorov's statistic for so many samples.
print(f"an exact sampler: about {0.87 / np.sqrt(SAMPLES):.3f}")
for num_steps in (5, 10, 20, 40):
    gaps = []
    for stochastic in (0.0, 1.0):
        data = np.sort(ways(sampler_of(num_steps), SAMPLES, stochastic)[-1, :, 0])
        cells = np.linspace(-6, 6, 6001)
        wanted = np.cumsum(exact(cells, 0.0)) * (cells[1] - cells[0])
        sampled = np.searchsorted(data, cells) / SAMPLES
        gaps.append(np.abs(sampled - wanted).max())
    print(f"{num_steps:2d} steps: ODE {gaps[0]:.3f}, SDE {gaps[1]:.3f}")

# %% [markdown]
# ## 2. The log-ratio of an action
#
# A stochastic step is a Gaussian: an *action* drawn at a *state*. Its log-prob is a
# mean over the latent's numbers (here two), as in the released code. After an update
# the same action has another log-prob, and the difference is the logarithm of the ratio
# that PPO clips. With `d` the distance between the two means in units of the std, and
# `e` the noise that was drawn, it is `(d . e - |d|^2 / 2) / 2`.

# %%
few = sampler_of(10)
STEP, ACTIONS = 6, 300
state = jnp.asarray(ways(few, 1, 1.0)[STEP]).reshape(1, 1, 1, 2)
step, always = jnp.array([STEP]), jnp.ones(1)
sigma = jnp.array(few.sigmas)[step]
fresh = jax.random.normal(jax.random.key(1), (ACTIONS, 1, 1, 2))
policies = {"old": MODES, "new": MODES + jnp.array([0.3, 0.1])}

at_state = [jnp.repeat(x, ACTIONS, axis=0) for x in (state, step, always)]
actions = rollout.draw(
    few,
    at_state[0],
    velocity(MODES, at_state[0], jnp.repeat(sigma, ACTIONS)),
    fresh,
    at_state[1],
    at_state[1] + 1,
    at_state[2],
)


def asked(modes):
    """Log-probs [1, action] of the actions under a policy, and its Gaussian."""
    drift = velocity(modes, state, sigma)
    return rollout.log_probs(few, state, actions[None], drift, step, step + 1, always)


(old, before), (new, after) = asked(policies["old"]), asked(policies["new"])
log_ratio = np.asarray(likelihood.log_ratio(new, old))[0]
again, _ = asked(policies["old"])
assert not np.any(likelihood.log_ratio(again, old))  # on-policy the ratio is 1, exactly

std = float(before.std[0])
moved = np.asarray(after.mean - before.mean).reshape(2) / std
noise = np.asarray(fresh).reshape(-1, 2)
formula = (noise @ moved - moved @ moved / 2) / 2
print(f"std of the step {std:.3f}; the means are {np.linalg.norm(moved):.3f} std apart")
print(f"largest |log-ratio - formula|: {np.abs(log_ratio - formula).max():.1e}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
points = np.asarray(actions).reshape(-1, 2)
limit = np.abs(log_ratio).max()
shown = left.scatter(
    *points.T, c=log_ratio, cmap="coolwarm", vmin=-limit, vmax=limit, s=14
)
for name, gaussian, color in (("old", before, "black"), ("new", after, RED)):
    centre = np.asarray(gaussian.mean).reshape(2)
    left.add_patch(plt.Circle(centre, std, fill=False, color=color, lw=1.2))
    left.plot(*centre, "x", color=color, ms=9, mew=2, label=f"{name} mean, 1 std")
left.set(xlabel="first number", ylabel="second number", aspect="equal")
left.set_title("actions at one state, by log-ratio")
left.legend(loc="upper left", fontsize="small")
figure.colorbar(shown, ax=left)

along = noise @ moved / np.linalg.norm(moved)
right.plot(along, log_ratio, ".", ms=4, color="tab:gray", label="likelihood.log_ratio")
ends = np.array([along.min(), along.max()])
line = (ends * np.linalg.norm(moved) - moved @ moved / 2) / 2
right.plot(ends, line, color=RED, lw=1, label="formula")
right.axhline(0, color="black", lw=0.6)
right.set(xlabel="noise along the way that the mean moved", ylabel="log-ratio")
right.set_title("more likely, where the noise went the same way")
_ = right.legend(fontsize="small")

# %% [markdown]
# ## 3. The advantages of a group
#
# There is no value network: an image is compared with the other images of its prompt.
# The paper divides by the std of the group, the released code by the std of all
# rewards of the batch (`train.advantage_std`: "group" or "global"). The first blows up
# a group whose images hardly differ. A group of equal rewards teaches nothing: exact
# zeros, whatever the rounding.

# %%
draws = np.random.default_rng(0)
rewards = np.concatenate(
    [
        draws.normal(0.5, 0.2, 8),  # a prompt that sometimes succeeds
        draws.normal(0.8, 0.01, 8),  # images that hardly differ
        np.full(8, 0.3),  # images that do not differ
    ]
)
owner = np.repeat(np.arange(3), 8)
advantages = {}
for std_of in ("group", "global"):
    advantages[std_of], statistics = advantage.group_advantages(
        rewards, owner, std=std_of
    )
assert not advantages["group"][owner == 2].any()
print(statistics)

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
panels = [("rewards", rewards), *((f'std "{k}"', v) for k, v in advantages.items())]
for axis, (title, values) in zip(axes, panels, strict=True):
    for group, color in enumerate((ODE, SDE, GREEN)):
        own = values[owner == group]
        axis.plot(group + np.linspace(-0.3, 0.3, 8), own, "o", ms=5, color=color)
        axis.hlines(own.mean(), group - 0.35, group + 0.35, color=color, lw=1)
    axis.set(title=title, xticks=range(3), xticklabels=["varied", "alike", "equal"])
axes[0].set_ylabel("reward")
axes[1].set_ylabel("advantage")
_ = axes[2].sharey(axes[1])

# %% [markdown]
# ## 4. G2RPO: branches and granularities
#
# In Flow-GRPO one reward at the end pays for all noises of a way. G2RPO lets the group
# part at one step at a time: an ODE trajectory, the *anchor*, is shared, and at each
# branch step every member takes one stochastic step from the same state and goes on by
# the ODE. What then differs is due to that step alone. Each action is finished at
# several *granularities* g, over every g-th node, and its advantages are added.
#
# Below is the plan of the recipe `g2rpo`, with fewer steps and members than in the
# paper, carried out by the trainer's rollout. What stands in place of the network
# writes down what it is asked: the forest is drawn from that, node by node.

# %%
config = flowgrpo_jax.config.make(
    recipe="g2rpo",
    reward={"closeness": 1.0},
    prompts_per_iteration=1,
    group_size=3,
    microbatch=4,
    sample__num_steps=10,
    sample__branch_steps=(1, 3, 5),
    sample__granularities=(1, 3),
)
planner = Planner(specs.plan_spec(config), devices=1)
jobs = planner.jobs(iteration=0)
forest = jobs[0].plan
seen = []  # what the network was asked, round by round


def recorded(modes, latents, sigma):
    jax.debug.callback(lambda *asked: seen.append(asked), latents, sigma, ordered=True)
    return velocity(modes, latents, sigma)


@functools.partial(jax.jit, static_argnums=0)
def roll(sampler, modes, key, tables):
    """The trainer's rollout, of latents of two numbers and without text."""
    return rollout.rollout(sampler, modes, key, tables, lambda prompt: (), (1, 1, 2))


recording = few.replace(velocity=recorded)
branched = roll(recording, MODES, jax.random.key(4), planner.pack(jobs).tables)
jax.effects_barrier()  # until all is written down

[rows] = packing.schedule([forest], config.microbatch)  # where a node was computed
latents, sigmas = (np.concatenate(column) for column in zip(*seen, strict=True))
node_latent = latents.reshape(-1, 2)[rows]
node_latent[forest.leaves] = np.asarray(branched.clean).reshape(-1, 2)
parent, at = forest.table[:, 0], forest.table[:, 1]
evaluated = forest.evaluated
assert np.array_equal(sigmas[rows[evaluated]], np.float32(few.sigmas)[at[evaluated]])


def way_to(node):
    """The numbers of the nodes from the first noise to this one."""
    way = [node]
    while parent[way[0]] != plan.ROOT:
        way.insert(0, int(parent[way[0]]))
    return way


unshared = sum(len(way_to(leaf)) - 1 for leaf in forest.leaves)
print(f"{len(forest.leaves)} images reward {len(forest.trained)} actions")
print(f"evaluations: {branched.evaluations.sum():.0f}, not shared {unshared}")

# %%
figure, axis = plt.subplots(figsize=(10, 4.6))
kinds = {
    -1: ("the anchor, an ODE", "black", "-", 2.4),
    0: ("finish, g = 1", ODE, "-", 1.0),
    1: ("finish, g = 3", GREEN, "--", 1.0),
}
for leaf, label in zip(forest.leaves, forest.labels, strict=True):
    way = way_to(leaf)
    acted = [n for n in way if n in forest.trained]
    begin = way.index(acted[0]) if acted else 0
    name, color, style, width = kinds[label.column]
    axis.plot(
        at[way[begin:]],
        node_latent[way[begin:], 0],
        style + "o",
        color=color,
        lw=width,
        ms=3,
        label=name,
        zorder=3 if label.column < 0 else 2,
    )
for action in forest.trained:
    edge = [parent[action], action]
    axis.plot(
        at[edge], node_latent[edge, 0], color=RED, lw=2, label="an action", zorder=4
    )
handles = dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
axis.legend(handles.values(), handles.keys(), fontsize="small", loc="lower left")
axis.set(xlabel="step, from noise (0) to an image (10)", ylabel="first number")
_ = axis.set_title(f"the forest that ran: {len(forest.nodes)} nodes")

# %% [markdown]
# An action is compared with the other actions at its step, once for each granularity.
# The reward here is the closeness to a target.

# %%
target = np.array([1.2, 0.9])


def reward_of(images):
    """Minus the distance to the target, of images [n, 1, 1, 2]."""
    return -np.linalg.norm(np.asarray(images).reshape(-1, 2) - target, axis=1)


closeness = reward_of(branched.clean)
spec = specs.advantage_spec(config)
leaves = credit.leaves_of(jobs, spec.key)
of_action, statistics = credit.of_actions(spec, {"closeness": closeness}, jobs, leaves)
rewarded = np.array(forest.credit)  # [action, granularity]: the images of an action
branch = at[parent[forest.trained]]
for k in np.unique(branch):
    print(f"step {k}:")
    for action in np.flatnonzero(branch == k):
        told = ", ".join(f"{value:6.3f}" for value in closeness[rewarded[action]])
        print(f"  rewards {told}: advantage {of_action[action]:+.2f}")

# %%
figure, axis = plt.subplots(figsize=(10, 4.6))
for node in range(len(forest.nodes)):
    if parent[node] != plan.ROOT:
        edge = [parent[node], node]
        axis.plot(at[edge], node_latent[edge, 0], color="0.8", lw=1, zorder=1)
largest = np.abs(of_action).max()
tint = plt.get_cmap("coolwarm_r")
for action, value in zip(forest.trained, of_action, strict=True):
    edge = [parent[action], action]
    color = tint(0.5 + 0.5 * value / largest)
    axis.plot(at[edge], node_latent[edge, 0], color=color, lw=4, zorder=3)
ends = axis.scatter(
    at[forest.leaves],
    node_latent[forest.leaves, 0],
    c=closeness,
    cmap="viridis",
    s=40,
    zorder=4,
)
figure.colorbar(ends, ax=axis, label="reward of an image")
scale = plt.cm.ScalarMappable(plt.Normalize(-largest, largest), tint)
figure.colorbar(scale, ax=axis, label="advantage of an action")
axis.set(xlabel="step, from noise (0) to an image (10)", ylabel="first number")
_ = axis.set_title("who is credited with what")

# %% [markdown]
# ## 5. Clipping, and the KL
#
# The loss of an action is `max(-A rho, -A clip(rho, 1 - c, 1 + c))`. It is flat where
# the ratio has gone far enough in the direction of the advantage: no gradient from
# there. It is not flat on the other side: a mistake can be taken back. (c is 0.2 here,
# to be seen; a mean over many latent dimensions is tiny, hence 1e-4 in the recipes.)

# %%
ratio = jnp.linspace(0.5, 1.5, 201)
clip = Clip(low=0.2, high=0.2, advantage=5.0)


def clipped_loss(log_ratio, advantage):
    return clipped_surrogate(log_ratio, advantage, clip)[0]


losses, slopes = {}, {}
for value in (1.0, -1.0):
    both = jax.vmap(jax.value_and_grad(clipped_loss), in_axes=(0, None))
    losses[value], slopes[value] = both(jnp.log(ratio), jnp.float32(value))

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharex=True)
for axis, curves, title in zip(
    axes, (losses, slopes), ("loss", "its gradient by the log-ratio"), strict=True
):
    for (value, curve), color in zip(curves.items(), (GREEN, RED), strict=True):
        axis.plot(ratio, curve, color=color, label=f"advantage {value:+.0f}")
    axis.axvspan(0.8, 1.2, color="0.93", zorder=0)
    axis.set(title=title, xlabel="ratio new / old")
_ = axes[0].legend(fontsize="small")

# %% [markdown]
# Now all of it together. What learns are the places of the two modes; the reward wants
# all images at the target. Each iteration samples 8 groups of 16 and makes 8 updates of
# the same samples, so that the ratio has time to run away. The penalty is the KL of
# every step to the model of the beginning (`kl_on_means`, the released code's form).

# %%
PROMPTS, GROUP, UPDATES = 8, 16, 8
chain = plan.chains(few.num_steps, tuple(range(10)), (tuple(range(9)),) * GROUP)
groups = [packing.Job(prompt, chain) for prompt in range(PROMPTS)]
packer = packing.Packer(packing.shape_of([chain], 1, 64), 64)
tables = packing.pack_all(packer, groups, per_pack=1, devices=1).tables
optimizer = optax.adam(0.03)
owner = np.repeat(np.arange(PROMPTS), GROUP)


def loss(modes, stored, advantages, clip, beta):
    """Loss and mean KL of all stored actions."""
    sigma = jnp.array(few.sigmas)[stored.step]
    drift = velocity(modes, stored.latent, sigma)
    here = likelihood.recompute_actions(few, stored, drift, with_old=False)
    losses, told = clipped_surrogate(here.log_ratio, advantages[:, None], clip)
    frozen = velocity(MODES, stored.latent, sigma)
    _, reference = likelihood.recompute(few, stored, frozen)
    form = functools.partial(divergence.kl_on_means, "official")
    kl = jax.vmap(form)(here.gaussian.mean, reference.mean, here.gaussian)
    return losses.mean() + beta * kl.mean(), {"kl": kl.mean()} | told


@jax.jit
def update(modes, state, stored, advantages, clip, beta):
    slope, told = jax.grad(loss, has_aux=True)(modes, stored, advantages, clip, beta)
    change, state = optimizer.update(slope, state)
    return optax.apply_updates(modes, change), state, told


def train(clip_range, beta):
    """(modes, history [iteration, reward and largest |log-ratio| and KL])"""
    modes, state, history = MODES, optimizer.init(MODES), []
    clip = Clip(clip_range, clip_range, 5.0)
    for iteration in range(ITERATIONS):
        rolled = roll(few, modes, jax.random.key(iteration), tables)
        stored = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rolled.transitions)
        rewards = reward_of(rolled.clean)
        advantages, _ = advantage.group_advantages(rewards, owner, std="global")
        acted = np.repeat(advantages, 9)  # a way's reward pays for its 9 trained steps
        for _ in range(UPDATES):
            modes, state, told = update(modes, state, stored, acted, clip, beta)
        far = np.abs(np.log(told["ratio"])).max()
        history.append((rewards.mean(), far, float(told["kl"])))
    return modes, np.array(history)


settings = {
    "no clip, no KL": (0.99, 0.0),
    "clip 0.02, no KL": (0.02, 0.0),
    "clip 0.02, KL 3": (0.02, 3.0),
}
trained = {name: train(*values) for name, values in settings.items()}
images = {"before": roll(few, MODES, jax.random.key(99), tables).clean}
for name, (modes, history) in trained.items():
    images[name] = roll(few, modes, jax.random.key(99), tables).clean
    print(f"{name:18s} reward {history[-1, 0]:.3f}, KL {history[-1, 2]:.3f}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3))
titles = ("reward", "largest |log-ratio| of the 8th update", "KL to the beginning")
for axis, title, column in zip(axes, titles, range(3), strict=True):
    for name, color in zip(trained, (RED, SDE, ODE), strict=True):
        axis.plot(trained[name][1][:, column], color=color, label=name)
    axis.set(title=title, xlabel="iteration")
axes[1].set_yscale("log")
axes[0].legend(fontsize="small")

figure, axes = plt.subplots(1, 4, figsize=(11, 3), sharex=True, sharey=True)
for axis, (name, clean) in zip(axes, images.items(), strict=True):
    axis.plot(*np.asarray(clean).reshape(-1, 2).T, "o", ms=3, alpha=0.6)
    axis.plot(*target, "x", color=RED, ms=10, mew=2)
    axis.set(title=name, aspect="equal")
_ = axes[0].set_ylabel("images, and the target")

# %% [markdown]
# Without a clip the ratios run away within an iteration; with it the policy stays near
# what it was sampled from, and is slower. Neither keeps the second mode: nothing pays
# for it. The KL does, and costs reward.
#
# ## Where this is in the package
#
# | section | functions |
# |---|---|
# | 1 | `flow/schedule.py`, `flow/transition.py`, `flow/rollout.py` |
# | 2 | `flow/rollout.py` (`log_probs`), `rl/likelihood.py` |
# | 3 | `rl/advantage.py` |
# | 4 | `flow/plan.py`, `flow/packing.py`, `engine/planner.py`, `engine/credit.py` |
# | 5 | `rl/objectives/clipping.py`, `rl/divergence.py`, `rl/update.py` |
#
# `examples/minimal_flow_grpo.py` is Flow-GRPO in plain loops; `docs/algorithms.md` has
# the other algorithms as rows of one table; `your_reward` trains on a reward of yours.
