"""One table: algorithm -> its value on every axis.

A row is a set of config values; a config file starts from a row and changes what its
task needs, the command line has the last word. Adding an algorithm is adding a row
(and, where it needs one, a new value of an axis in flow/ or rl/). docs/algorithms.md
shows the axes and how to add a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flowgrpo_jax.errors import not_one_of

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """An algorithm: its paper, when to take it, and its values of the config keys.

    `authors` has, by model, what the authors trained it with beside that.
    """

    paper: str
    when: str
    values: Values
    authors: Mapping[str, Values] = field(default_factory=dict)


# What the authors of Flow-GRPO trained SD3.5-M and FLUX.1-dev with; many followed.
_SD35 = {
    "sample.num_steps": 10,
    "sample.eval_num_steps": 40,
    "sample.guidance_scale": 4.5,
    "group_size": 24,
    "prompts_per_iteration": 48,
    "train.learning_rate": 3e-4,
    "train.lora_rank": 32,
}
# Trained and evaluated without guidance, where `_SD35` has it.
_UNGUIDED = {"sample.guidance_scale": 1.0, "eval.guidance_scale": 1.0}
_FLUX = {
    "sample.num_steps": 6,
    "sample.eval_num_steps": 28,
    "sample.guidance_scale": 3.5,
    "sample.noise_level": 0.9,
    "group_size": 24,
    "prompts_per_iteration": 48,
    "train.learning_rate": 3e-4,
    "train.beta": 0.0,
    "train.zero_advantage": "count",  # train_flux.py has no filter, train_sd3.py has
}
# What DanceGRPO's code and its descendants (MixGRPO, G2RPO, ...) share.
_DANCE_FAMILY: Values = {
    "sample.schedule": "shifted",
    "sample.init_noise": "shared",
    "train.advantage_std": "group",
    "train.advantage_ddof": 1,  # torch's std
    "train.advantage_eps": 1e-8,
    "train.zero_advantage": "count",
    "train.clip_range": 1e-4,
    "train.beta": 0.0,
    "train.ema": False,
}
_DANCE_FLUX = {
    "resolution": 720,
    "sample.shift": 3.0,  # fixed, whatever the size
    "group_size": 12,
    "sample.guidance_scale": 3.5,
    "train.learning_rate": 1e-5,
    "train.use_lora": False,
}
_G2RPO_FLUX = {
    **_DANCE_FLUX,
    "prompts_per_iteration": 16,
    "num_iterations": 301,
    "train.learning_rate": 2e-6,
}
_MIX_FLUX = {**_DANCE_FLUX, "prompts_per_iteration": 32, "num_iterations": 300}
_FLOW_SDE: Values = {
    "sample.plan": "all",
    "sample.sde_type": "sde",
    "sample.noise_level": 0.7,
    "train.objective": "ppo_clip",
    "train.timestep_fraction": 0.99,
    "train.advantage_std": "global",
    "train.clip_range": 1e-4,
    "train.beta": 0.04,
    "train.kl_form": "official",
}
_G2RPO: Values = {
    **_DANCE_FAMILY,
    "sample.plan": "branch",
    "sample.sde_type": "sde",
    "sample.noise_level": 0.7,
    "sample.num_steps": 16,
    "sample.branch_steps": tuple(range(8)),
    "sample.granularities": (1, 2, 3),
    "sample.whole_anchor": True,
    "group_size": 12,
    "updates_per_iteration": 1,
    "train.update_order": "steps",
    "train.advantage_key": "step",
    "train.reward_combination": "advantage",
}
_MIX: Values = {
    **_DANCE_FAMILY,
    "sample.plan": "progressive_window",
    "sample.sde_type": "sde",
    "sample.noise_level": 0.7,
    "sample.num_steps": 25,
    "sample.sde_window_size": 4,
    "sample.sde_window_range": (0, 24),
    "sample.window_every": 25,
    "updates_per_iteration": 4,
    "train.reward_combination": "advantage_mean",
}
# Forward-process methods: the ODE without guidance, then matching at random sigmas;
# never the guided velocity, whatever samples. All samples count, also where a group
# ties: a loss on samples has a part that no advantage weighs.
_FORWARD: Values = {
    "sample.plan": "ode",
    "sample.guidance_scale": 1.0,
    "train.guidance_scale": 1.0,
    "train.kl_form": "velocity",
    "train.beta": 0.0,
    "train.zero_advantage": "count",
}
_MATCHING: Values = {
    **_FORWARD,
    "train.objective": "weighted_matching",
    "train.behaviour": "copy",
    "train.behaviour_every": 40,
}
# Where diffusers' training of SD3 noises: logit-normal, then the model's shift of 3
# (train_sd3_dpo.py, train_sd3_sft.py index the scheduler's shifted timesteps).
_LOGIT_NORMAL = {"sigma": "logit_normal", "shift": 3.0}
# 39 draws of every image. Theirs are samples of the SDE: of its 40 steps the ODE's differ
# little, and have no noise left that matching would learn.
_MATCHING_SD35: Values = {
    **_SD35,
    "sample.num_steps": 40,
    "train.draws": 39,
}

RECIPES: dict[str, Recipe] = {
    "flow_grpo": Recipe(
        paper="Flow-GRPO, arXiv 2505.05470",
        when="the reference: every step stochastic, KL to the frozen model",
        values=_FLOW_SDE,
        authors={"sd3.5-medium": _SD35, "flux.1-dev": _FLUX},
    ),
    "flow_grpo_fast": Recipe(
        paper="Flow-GRPO-Fast (authors' release of 2025-10), arXiv 2505.05470",
        when="a few stochastic steps among the first ones: most of the gain, less cost",
        values={
            **_FLOW_SDE,
            "sample.plan": "random_window",
            "sample.sde_type": "cps",
            "sample.noise_level": 0.8,
            "sample.sde_window_size": 3,
            "sample.sde_window_range": (0, 5),
            "sample.guidance_scale": 1.0,
            "train.clip_range": 1e-5,
            "train.beta": 0.0,
        },
        authors={
            "sd3.5-medium": _SD35 | _UNGUIDED,
            "flux.1-dev": {
                **_FLUX,
                "sample.noise_level": 0.8,
                "sample.sde_window_range": (0, 3),
            },
        },
    ),
    "flow_grpo_fast_v1": Recipe(
        paper="Flow-GRPO-Fast (authors' release of 2025-07), arXiv 2505.05470",
        when="little compute: a group shares the way to its stochastic step, and the "
        "network's price there; here one step and more KL, for the embedded model",
        values={
            **_FLOW_SDE,
            "sample.plan": "branch",
            "sample.init_noise": "shared",
            "sample.sde_window_size": 1,
            "sample.sde_window_range": (1, 6),
            # Ten times Flow-GRPO's: less lets free colours narrow (docs/results.md).
            "train.beta": 0.4,
        },
        authors={
            "sd3.5-medium": {
                **_SD35,
                "sample.sde_window_size": 2,
                # Starts 0 to 5 (of all 24 of a prompt; theirs are mini-groups of 9
                # with a start each).
                "sample.sde_window_range": (0, 7),
                "sample.noise_level": 0.8,
                "train.clip_range": 1e-5,
                "train.beta": 0.0,
                "train.zero_advantage": "count",
            }
        },
    ),
    "g2rpo": Recipe(
        paper="G2RPO (Granular-GRPO), arXiv 2510.01982",
        when="preference rewards on large models: each branch step gets its own credit, "
        "rated at three granularities; dear sampling, cheap updates",
        values=_G2RPO,
        authors={"flux.1-dev": _G2RPO_FLUX},
    ),
    "g2rpo_released": Recipe(
        paper="G2RPO as in the authors' scripts, arXiv 2510.01982",
        when="as g2rpo with granularities 1 and 2: a fifth less sampling",
        values={**_G2RPO, "sample.granularities": (1, 2)},
        authors={"flux.1-dev": _G2RPO_FLUX},
    ),
    "e_grpo": Recipe(
        paper="E-GRPO, arXiv 2601.00423",
        when="as g2rpo where late steps explore too little: they jump over two sigmas",
        values={
            **_G2RPO,
            "sample.granularities": (1, 2),
            "sample.merge_steps": (1, 1, 1, 1, 2, 2, 2, 2),
        },
        authors={"flux.1-dev": {**_DANCE_FLUX, "num_iterations": 300}},
    ),
    "dance_grpo": Recipe(
        paper="DanceGRPO, arXiv 2505.07818",
        when="the baseline of the G2RPO papers: constant noise, 60% of the steps",
        values={
            **_DANCE_FAMILY,
            "sample.plan": "subset",
            "sample.sde_type": "dance",
            "sample.noise_level": 0.3,
            "sample.num_steps": 16,
            "train.timestep_fraction": 0.6,
        },
        authors={
            "flux.1-dev": {
                **_DANCE_FLUX,
                "prompts_per_iteration": 16,
                # Theirs are three, of four of the twelve images of all prompts; here an
                # update has whole groups, and its number divides that of prompts.
                "updates_per_iteration": 4,
                "num_iterations": 300,
            }
        },
    ),
    "mix_grpo": Recipe(
        paper="MixGRPO, arXiv 2507.21802",
        when="half of DanceGRPO's cost: a window slides from noisy to clean steps",
        values=_MIX,
        authors={"flux.1-dev": _MIX_FLUX},
    ),
    "mix_grpo_flash": Recipe(
        paper="MixGRPO-Flash, arXiv 2507.21802",
        when="as mix_grpo; after the window DPM-Solver++ takes 40% of the steps",
        values={**_MIX, "sample.finish_ratio": 0.4, "sample.window_every": 20},
        authors={"flux.1-dev": _MIX_FLUX},
    ),
    "tempflow_grpo": Recipe(
        paper="TempFlow-GRPO, arXiv 2508.04324",
        when="rule rewards, few updates: branches at every step, weighted by its noise",
        values={
            **_FLOW_SDE,
            "sample.plan": "branch",
            "sample.init_noise": "shared",
            "sample.branch_steps": tuple(range(9)),
            "sample.branch_anchors": 4,
            "group_size": 6,
            "train.advantage_key": "step",
            "train.advantage_std": "group",
            "train.step_weight": "std",
            "train.beta": 0.004,
            "train.kl_form": "paper",
        },
        authors={"sd3.5-medium": {**_SD35, "group_size": 6}},
    ),
    "branch_grpo": Recipe(
        paper="BranchGRPO, arXiv 2509.06040",
        when="a tree of shared prefixes: a third less sampling, credit by depth",
        values={
            **_DANCE_FAMILY,
            "sample.plan": "tree",
            "sample.sde_type": "dance",
            "sample.noise_level": 0.3,
            "sample.num_steps": 20,
            "sample.branch_steps": (0, 3, 6, 9),
            "sample.fanout": 2,
            "group_size": 16,
            "train.timestep_fraction": 0.95,
            "train.backup": "mean",
            "train.clip_range": 1e-3,
        },
        authors={
            "flux.1-dev": {**_DANCE_FLUX, "group_size": 16, "num_iterations": 300}
        },
    ),
    "dense_grpo": Recipe(
        paper="DenseGRPO, arXiv 2601.20218",
        when="credit for every step by what it adds; five times the sampling",
        values={
            **_FLOW_SDE,
            "sample.probe_steps": 10,
            "train.backup": "difference",
            "train.advantage_std": "group",
        },
        authors={"sd3.5-medium": _SD35},
    ),
    "flow_cps": Recipe(
        paper="Coefficients-preserving sampling, arXiv 2509.05952",
        when="as flow_grpo with clean rollouts: rewards see no leftover noise",
        values={
            **_FLOW_SDE,
            "sample.sde_type": "cps",
            "sample.noise_level": 0.8,
            "train.clip_range": 1e-5,
        },
        authors={"flux.1-dev": {**_FLUX, "sample.noise_level": 0.8}},
    ),
    "grpo_guard": Recipe(
        paper="GRPO-Guard, arXiv 2510.22319",
        when="long runs without KL: ratios without bias, all steps clipped alike",
        values={
            **_FLOW_SDE,
            "train.objective": "guard",
            "train.advantage_std": "group",
            "train.clip_range": 2e-6,
            "train.beta": 0.0,
        },
        authors={"sd3.5-medium": {**_SD35, "train.learning_rate": 1e-4}},
    ),
    "flow_dppo": Recipe(
        paper="Flow-DPPO, arXiv 2606.11025",
        when="several updates on one rollout: a trust region on the exact KL",
        values={
            **_FLOW_SDE,
            "sample.plan": "random_window",
            "sample.sde_window_size": 3,
            "sample.sde_window_range": (0, 5),
            "sample.guidance_scale": 1.0,
            "train.objective": "dppo",
            "train.objective_options": {"threshold": 1e-5},
            "train.advantage_std": "group",
            "train.beta": 0.0,
        },
        authors={"sd3.5-medium": {**_SD35, **_UNGUIDED, "group_size": 16}},
    ),
    "diffusion_nft": Recipe(
        paper="DiffusionNFT, arXiv 2509.16117",
        when="rule rewards at the least compute: no SDE, no guidance, any sampler",
        values={
            **_FORWARD,
            "updates_per_iteration": 1,
            "train.objective": "nft",
            # Nine of the ten sigmas at which the sampler asked, in random order.
            "train.objective_options": {"beta": 1.0, "sigma": "nodes"},
            "train.draws": 9,
            "train.zero_advantage": "drop",
            "train.advantage_std": "global",
            "train.beta": 1e-4,
            "train.behaviour": "ema",
            "train.behaviour_ramp": (0.0, 0.001, 0, 0.5),
        },
        authors={"sd3.5-medium": _SD35 | _UNGUIDED},
    ),
    "awm": Recipe(
        paper="Advantage Weighted Matching, arXiv 2509.25050",
        when="the simplest forward-process method: pretraining's loss, weighted",
        values={
            **_FORWARD,
            "sample.num_steps": 14,
            "updates_per_iteration": 1,
            "train.objective": "awm",
            # The sampler's first 90% without the first, a draw in each sixth of them.
            "train.objective_options": {
                "sigma": "stratified",
                "node_min": 0.01,
                "node_max": 0.9,
            },
            "train.clip_range": 1.0,  # never reached: one update, whose ratio is 1
            "train.draws": 6,
            "train.advantage_std": "group",
            "train.beta": 0.003,
            "train.ema_decay": 0.99,
            "train.ema_every": 1,
            "train.ema_beta": 1.0,
            "train.behaviour": "learner_beside_ema",
            "train.behaviour_ramp": (0.0, 0.001, 0, 0.3),
        },
        authors={
            "sd3.5-medium": {
                **_SD35,
                **_UNGUIDED,
                "sample.num_steps": 14,
                "prompts_per_iteration": 24,
            }
        },
    ),
    "dgpo": Recipe(
        paper="DGPO, arXiv 2510.08425",
        when="whole groups compared at once, as direct preference does with pairs",
        values={
            **_FORWARD,
            "updates_per_iteration": 1,
            "train.objective": "dgpo",
            "train.objective_options": {
                "beta": 100.0,
                "sigma": "nodes",
                "node_max": 0.6,
            },
            "train.clip_range": 1e-3,
            "train.draws": 4,
            "train.advantage_std": "group",
            "train.beta": 0.001,
            # Samples and is what ratios are to, from the first update on (theirs
            # samples after 200, until which it hardly differs from the learner).
            "train.behaviour": "ema",
            "train.behaviour_ramp": (0.0, 0.001, 0, 0.3),
        },
        authors={"sd3.5-medium": {**_SD35, **_UNGUIDED, "train.lora_rank": 64}},
    ),
    "crd": Recipe(
        paper="Centered Reward Distillation, arXiv 2603.14128",
        when="against reward hacking: rewards distilled, a guided model as reference",
        values={
            **_FORWARD,
            "train.objective": "crd",
            "train.draws": 20,
            "train.advantage_std": "global",
            "train.beta": 0.1,
            "train.kl_reference": "guided",
            "train.kl_floor": 1e-3,
            "train.behaviour": "ema",
            "train.behaviour_ramp": (0.25, 0.005, 0, 0.999),
        },
        authors={"sd3.5-medium": _SD35 | _UNGUIDED},
    ),
    "orw_cfm_w2": Recipe(
        paper="ORW-CFM-W2, arXiv 2502.06061",
        when="small models: reward-weighted matching with a Wasserstein bound",
        values={
            **_MATCHING,
            "train.objective_options": {"weight": "exp_reward", "tau": 5.0},
            "train.behaviour_every": 1,
            "train.beta": 0.1,
        },
        authors={"sd3.5-medium": _UNGUIDED},
    ),
    "online_dpo": Recipe(
        paper="Diffusion-DPO, online, as Flow-GRPO's baseline, arXiv 2505.05470",
        when="only comparisons are trusted: the best image against the worst",
        values={
            **_MATCHING,
            "sample.num_steps": 40,
            "train.objective": "dpo",
            "train.objective_options": {"beta": 100.0, **_LOGIT_NORMAL},
        },
        authors={"sd3.5-medium": _MATCHING_SD35},
    ),
    "rwr": Recipe(
        paper="reward-weighted regression, Flow-GRPO's baseline, arXiv 2505.05470",
        when="a baseline: matching on own samples, weighted by the raw reward",
        values={
            **_MATCHING,
            "train.objective_options": {"weight": "reward", **_LOGIT_NORMAL},
        },
        authors={"sd3.5-medium": _MATCHING_SD35},
    ),
    "sft": Recipe(
        paper="rejection fine-tuning, Flow-GRPO's baseline, arXiv 2505.05470",
        when="a baseline: matching on the best own sample of every group",
        values={
            **_MATCHING,
            "train.objective_options": {"weight": "one", **_LOGIT_NORMAL},
            "train.select": "best",
        },
        authors={"sd3.5-medium": _MATCHING_SD35},
    ),
    "pretrain": Recipe(
        paper="rectified flow, arXiv 2403.03206",
        when="to make a base model from captioned scenes; no reward",
        values={
            "sample.plan": "ode",
            "train.objective": "flow_matching",
            "train.guidance_scale": 1.0,
            "train.optimizer": "muon",
            "train.trains_text": True,
            "train.use_lora": False,
            "train.beta": 0.0,
            "updates_per_iteration": 1,
        },
    ),
}


def recipe(name: str) -> Recipe:
    """The row of that name; UserError with all names otherwise."""
    if name not in RECIPES:
        raise not_one_of("recipe", name, RECIPES)
    return RECIPES[name]


def describe() -> str:
    """All rows for --list_recipes: when, paper, and what its authors trained with."""
    lines = []
    for name, row in RECIPES.items():
        lines += [name, f"    {row.when}", f"    {row.paper}"]
        for model, values in row.authors.items():
            told = ", ".join(f"{key} {value}" for key, value in values.items())
            lines.append(f"    {model}: {told}")
    return "\n".join(lines)
