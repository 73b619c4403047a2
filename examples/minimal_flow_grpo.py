"""Flow-GRPO in plain loops, on a flow of two numbers: start here.

    python examples/minimal_flow_grpo.py

An "image" is two numbers; its reward is minus the squared distance to a target. The
data of the flow are Gaussian, N(mean, STD^2), so its velocity is known in closed form
and all that learns is the mean. An iteration is what the trainer does with a network,
in the same order and by the same functions: sample groups with the SDE, compare the
rewards within each group, follow the gradient of PPO's clipped loss. The trainer adds
batches, devices, checkpoints and the other algorithms: tests/test_minimal_example.py
holds that both give the same numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flowgrpo_jax.flow import schedule, transition
from flowgrpo_jax.rl import advantage
from flowgrpo_jax.rl.likelihood import Actions
from flowgrpo_jax.rl.objectives.clipping import Clip
from flowgrpo_jax.rl.objectives.options import NoOptions
from flowgrpo_jax.rl.objectives.ppo_clip import ppo_clip

STD, TARGET = 0.5, np.array([1.0, 0.5])
PROMPTS, GROUP_SIZE, UPDATES = 8, 12, 2  # of an iteration
NUM_STEPS, SHIFT, NOISE_LEVEL = 6, 3.0, 0.7
SIGMAS = jnp.asarray(schedule.shifted(NUM_STEPS, SHIFT))  # from 1, noise, to 0, data
CLIP = Clip(low=0.05, high=0.05, advantage=5.0)
LEARNING_RATE = 0.03
OPTIMIZER = optax.adam(LEARNING_RATE, eps=1e-12)


def velocity(mean, latent, sigma):
    """E[noise - data | latent], where latent = (1 - sigma) * data + sigma * noise."""
    away = latent - (1 - sigma) * mean
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    return (sigma - (1 - sigma) * STD**2) / variance * away - mean


def gaussian_of(mean, latent, step):
    """The distribution of the latent after this step of the SDE (Flow-GRPO, eq. 9)."""
    sigma, sigma_next = SIGMAS[step], SIGMAS[step + 1]
    return transition.gaussian(
        "sde",
        latent,
        velocity(mean, latent, sigma),
        sigma,
        sigma_next,
        sigma_max=SIGMAS[1],
        noise_level=NOISE_LEVEL,
    )


@jax.jit
def noise_of(key, prompt, counter):
    """Noise of a group: a function of (seed, iteration, prompt, member, step)."""

    def one(member):
        own = jax.random.fold_in(jax.random.fold_in(key, prompt), member)
        return jax.random.normal(jax.random.fold_in(own, counter), (1, 1, 2))

    return jax.vmap(one)(jnp.arange(GROUP_SIZE))


@jax.jit
def act(mean, latents, noise, step):
    """(next latents, their log-probs) of a group [member, 1, 1, 2]."""

    def one(latent, fresh):
        gaussian = gaussian_of(mean, latent, step)
        following = transition.sample(gaussian, fresh)
        return following, transition.log_prob("sde", following, gaussian)

    return jax.vmap(one)(latents, noise)


def sample_group(mean, key, prompt):
    """Images [member, 2], and of every step its number, latents before and after it,
    and log-probs."""
    latents, trajectory = noise_of(key, prompt, 0), []
    for step in range(NUM_STEPS):
        following, log_prob = act(mean, latents, noise_of(key, prompt, 1 + step), step)
        trajectory.append((step, latents, following, log_prob))
        latents = following
    return np.asarray(latents).reshape(GROUP_SIZE, 2), trajectory


@jax.jit
@jax.grad
def slope(mean, step, latents, following, old_log_prob, advantages):
    """The gradient of the sum of a group's losses at one step, by the mean."""
    gaussian = jax.vmap(lambda latent: gaussian_of(mean, latent, step))(latents)
    log_prob = jax.vmap(lambda x, g: transition.log_prob("sde", x, g))
    actions = Actions(  # [member, 1]: every state has one action
        log_prob=log_prob(following, gaussian)[:, None],
        old_log_prob=old_log_prob[:, None],
        next_latent=following[:, None],
        gaussian=gaussian,
        old_gaussian=None,
        dt=jnp.full(GROUP_SIZE, SIGMAS[step] - SIGMAS[step + 1]),
    )
    losses, _ = ppo_clip(actions, advantages[:, None], CLIP, NoOptions())
    return losses.sum()


def iterate(mean, optimizer_state, seed, iteration):
    """One iteration: (new mean, new state of the optimizer, mean reward)."""
    key = jax.random.fold_in(jax.random.key(seed), iteration)
    groups = [sample_group(mean, key, prompt) for prompt in range(PROMPTS)]

    images = np.concatenate([of_group for of_group, _ in groups])
    rewards = -np.square(images - TARGET).sum(axis=1)
    owner = np.repeat(np.arange(PROMPTS), GROUP_SIZE)
    advantages, _ = advantage.group_advantages(rewards, owner, std="global")
    advantages = advantages.reshape(PROMPTS, GROUP_SIZE)

    for chunk in np.split(np.arange(PROMPTS), UPDATES):
        total, count = jnp.zeros(2), 0
        for prompt in chunk:
            _, trajectory = groups[prompt]
            for step, *stored in trajectory[:-1]:  # the last step is not trained
                total += slope(mean, step, *stored, advantages[prompt])
                count += GROUP_SIZE
        change, optimizer_state = OPTIMIZER.update(total / count, optimizer_state)
        mean = optax.apply_updates(mean, change)
    return mean, optimizer_state, rewards.mean()


def main(iterations=30, seed=0):
    """Train, and print the reward as it rises."""
    mean = jnp.zeros(2)
    optimizer_state = OPTIMIZER.init(mean)
    for iteration in range(iterations):
        mean, optimizer_state, reward = iterate(mean, optimizer_state, seed, iteration)
        print(f"iteration {iteration:2d}  reward {reward:7.4f}  mean {mean}")


if __name__ == "__main__":
    main()
