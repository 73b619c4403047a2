"""What the authors of every row ran, where it is written, and where ours is different.

`python -m tests.authors` writes the table of docs/algorithms.md from here;
`test_recipe_authors.py` holds both against the rows.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).parents[1] / "docs" / "algorithms.md"
TITLE = "## Rows and their authors"
SD35, FLUX = "sd3.5-medium", "flux.1-dev"


class Same(NamedTuple):
    """Values of the authors that the row has, on the model that they trained."""

    recipe: str
    model: str
    source: str
    values: dict[str, Any]


class Differs(NamedTuple):
    """What is not as the authors have it; `ours` is the row's value of `key`.

    Without a `key` it is code, which `ours` tells in words.
    """

    recipe: str
    model: str
    source: str
    key: str
    authors: Any
    ours: Any
    why: str


_NODES = {"sigma": "nodes"}
_LOGIT_NORMAL = {"sigma": "logit_normal", "shift": 3.0}
_FLOW_GRPO = {
    "group_size": 24,
    "prompts_per_iteration": 48,
    "train.learning_rate": 3e-4,
}
_TEN = {**_FLOW_GRPO, "sample.num_steps": 10, "sample.eval_num_steps": 40}
_GUIDED = {"sample.guidance_scale": 4.5}
_UNGUIDED = {"sample.guidance_scale": 1.0, "eval.guidance_scale": 1.0}
_DANCE = {
    "resolution": 720,
    "sample.shift": 3.0,
    "sample.init_noise": "shared",
    "train.advantage_std": "group",
    "train.advantage_ddof": 1,
    "train.advantage_eps": 1e-8,
    "train.zero_advantage": "count",
    "train.use_lora": False,
    "train.beta": 0.0,
    "train.ema": False,
}
_G2RPO = {
    **_DANCE,
    "group_size": 12,
    "sample.num_steps": 16,
    "sample.noise_level": 0.7,
    "sample.branch_steps": tuple(range(8)),
    "train.update_order": "steps",
    "train.advantage_key": "step",
    "train.reward_combination": "advantage",
    "train.clip_range": 1e-4,
}
_MIX = {
    **_DANCE,
    "group_size": 12,
    "prompts_per_iteration": 32,
    "updates_per_iteration": 4,
    "num_iterations": 300,
    "sample.num_steps": 25,
    "sample.noise_level": 0.7,
    "sample.sde_window_size": 4,
    "train.reward_combination": "advantage_mean",
    "train.clip_range": 1e-4,
    "train.learning_rate": 1e-5,
}
_BASELINE = {
    **_FLOW_GRPO,
    **_GUIDED,
    "sample.num_steps": 40,
    "train.draws": 39,
    "train.guidance_scale": 1.0,
    "train.behaviour_every": 40,
}
_SDE_BASELINE = (
    "of 40 steps the ODE's samples differ little, and have no noise left to learn"
)

ENTRIES: tuple[Same | Differs, ...] = (
    Same(
        "flow_grpo",
        SD35,
        "flow_grpo, config/grpo.py geneval_sd3, train_sd3.py",
        {
            **_TEN,
            **_GUIDED,
            "sample.noise_level": 0.7,
            "train.clip_range": 1e-4,
            "train.beta": 0.04,
            "train.advantage_std": "global",
            "train.zero_advantage": "drop",
            "train.lora_rank": 32,
            "train.ema_decay": 0.9,
            "train.ema_every": 8,
            "updates_per_iteration": 2,
        },
    ),
    Same(
        "flow_grpo",
        FLUX,
        "flow_grpo, config/grpo.py pickscore_flux, train_flux.py",
        {
            **_FLOW_GRPO,
            "sample.num_steps": 6,
            "sample.eval_num_steps": 28,
            "sample.guidance_scale": 3.5,
            "sample.noise_level": 0.9,
            "train.beta": 0.0,
            "train.zero_advantage": "count",
            "train.lora_rank": 64,
            "train.lora_alpha": 128.0,
        },
    ),
    Differs(
        "flow_grpo",
        SD35,
        "ema.py",
        "",
        "no EMA before update 8",
        "follows from the first update",
        "a short run would be scored by the model that it began with",
    ),
    Same(
        "flow_grpo_fast",
        SD35,
        "flow_grpo, geneval_sd3_fast_nocfg, train_sd3_fast.py",
        {
            **_TEN,
            **_UNGUIDED,
            "sample.sde_type": "cps",
            "sample.noise_level": 0.8,
            "sample.sde_window_size": 3,
            "sample.sde_window_range": (0, 5),
            "train.clip_range": 1e-5,
            "train.beta": 0.0,
            "train.zero_advantage": "drop",
        },
    ),
    Same(
        "flow_grpo_fast",
        FLUX,
        "flow_grpo, geneval_flux_fast, train_flux_fast.py",
        {
            **_FLOW_GRPO,
            "sample.num_steps": 6,
            "sample.guidance_scale": 3.5,
            "sample.noise_level": 0.8,
            "sample.sde_window_size": 3,
            "sample.sde_window_range": (0, 3),
            "train.clip_range": 1e-5,
            "train.zero_advantage": "count",
        },
    ),
    Same(
        "flow_grpo_fast_v1",
        SD35,
        "flow_grpo of 2025-07, pickscore_sd3_fast; randint(0, T/2), both ends",
        {
            **_TEN,
            **_GUIDED,
            "sample.sde_window_size": 2,
            "sample.sde_window_range": (0, 7),
            "sample.noise_level": 0.8,
            "train.clip_range": 1e-5,
            "train.beta": 0.0,
            "train.zero_advantage": "count",
        },
    ),
    Differs(
        "flow_grpo_fast_v1",
        SD35,
        "the same",
        "",
        "9 of 24 images share a start",
        "all 24 of a prompt",
        "a plan is that of a prompt's group; the price of the shared way falls",
    ),
    Same(
        "g2rpo",
        FLUX,
        "Granular-GRPO, finetune_g2rpo_hps_clip.sh; arXiv 2510.01982",
        {
            **_G2RPO,
            "prompts_per_iteration": 16,
            "num_iterations": 301,
            "sample.granularities": (1, 2, 3),
            "train.learning_rate": 2e-6,
        },
    ),
    Same(
        "g2rpo_released",
        FLUX,
        "Granular-GRPO's later scripts",
        {**_G2RPO, "sample.granularities": (1, 2), "train.learning_rate": 2e-6},
    ),
    Same(
        "e_grpo",
        FLUX,
        "VisualGRPO's defaults; arXiv 2601.00423",
        {
            **_G2RPO,
            "sample.granularities": (1, 2),
            "num_iterations": 300,
            "train.learning_rate": 1e-5,
        },
    ),
    Differs(
        "e_grpo",
        FLUX,
        "arXiv 2601.00423",
        "",
        "steps merge below an entropy",
        "the last four branch steps go over two sigmas",
        "which ones is not published with the defaults",
    ),
    Same(
        "dance_grpo",
        FLUX,
        "DanceGRPO, finetune_flux_grpo.sh, train_grpo_flux.py",
        {
            **_DANCE,
            "group_size": 12,
            "num_iterations": 300,
            "sample.num_steps": 16,
            "sample.noise_level": 0.3,
            "train.timestep_fraction": 0.6,
            "train.clip_range": 1e-4,
            "train.learning_rate": 1e-5,
        },
    ),
    Differs(
        "dance_grpo",
        FLUX,
        "the same",
        "updates_per_iteration",
        3,
        4,
        "theirs are of four of the twelve images of all prompts; ours of whole groups",
    ),
    Same(
        "mix_grpo",
        FLUX,
        "MixGRPO, finetune_flux_grpo_MixGRPO.sh; arXiv 2507.21802",
        {**_MIX, "sample.window_every": 25},
    ),
    Same(
        "mix_grpo_flash",
        FLUX,
        "MixGRPO-Flash's script",
        {**_MIX, "sample.window_every": 20, "sample.finish_ratio": 0.4},
    ),
    Differs(
        "mix_grpo_flash",
        FLUX,
        "the same",
        "",
        "DPM-Solver++, midpoint",
        "DPM-Solver++(2M), multistep",
        "one evaluation a step, as their count of evaluations has it",
    ),
    Same(
        "tempflow_grpo",
        SD35,
        "arXiv 2508.04324 and its code",
        {
            "group_size": 6,
            "sample.branch_anchors": 4,
            "sample.num_steps": 10,
            "sample.noise_level": 0.7,
            "prompts_per_iteration": 48,
            "train.step_weight": "std",
            "train.beta": 0.004,
        },
    ),
    Differs(
        "tempflow_grpo",
        SD35,
        "the same",
        "",
        "2.25 std as step weight",
        "std over its mean",
        "their constant is that of one schedule; the mean is 1 on any",
    ),
    Same(
        "branch_grpo",
        FLUX,
        "arXiv 2509.06040 and its code",
        {
            **_DANCE,
            "group_size": 16,
            "num_iterations": 300,
            "sample.num_steps": 20,
            "sample.noise_level": 0.3,
            "sample.branch_steps": (0, 3, 6, 9),
            "train.clip_range": 1e-3,
            "train.learning_rate": 1e-5,
        },
    ),
    Differs(
        "branch_grpo",
        FLUX,
        "the same",
        "",
        "noise times 4 at splits; pruning",
        "neither",
        "the log-prob would be of another distribution than the samples'",
    ),
    Same(
        "dense_grpo",
        SD35,
        "arXiv 2601.20218",
        {**_TEN, **_GUIDED, "train.backup": "difference", "train.beta": 0.04},
    ),
    Differs(
        "dense_grpo",
        SD35,
        "the same",
        "sample.noise_levels",
        "calibrated table",
        (),
        "it is of their model and reward: the key takes the user's",
    ),
    Same(
        "flow_cps",
        FLUX,
        "FlowCPS, arXiv 2509.05952",
        {
            **_FLOW_GRPO,
            "sample.sde_type": "cps",
            "sample.noise_level": 0.8,
            "sample.num_steps": 6,
            "train.clip_range": 1e-5,
        },
    ),
    Same(
        "grpo_guard",
        SD35,
        "flow_grpo, config/grpo_guard.py geneval_sd3_rationorm",
        {
            **_TEN,
            **_GUIDED,
            "train.learning_rate": 1e-4,
            "train.clip_range": 2e-6,
            "train.advantage_std": "group",
            "train.beta": 0.0,
            "train.zero_advantage": "drop",
        },
    ),
    Differs(
        "grpo_guard",
        SD35,
        "train_sd3_GRPO_Guard.py",
        "",
        "bias averaged over the batch",
        "each action's own",
        "the paper's formula; theirs reduces an empty tuple of dimensions",
    ),
    Same(
        "flow_dppo",
        SD35,
        "UniRL, arXiv 2606.11025",
        {
            **_UNGUIDED,
            "group_size": 16,
            "sample.num_steps": 10,
            "sample.noise_level": 0.7,
            "sample.sde_window_size": 3,
            "train.objective_options": {"threshold": 1e-5},
            "updates_per_iteration": 2,
        },
    ),
    Same(
        "diffusion_nft",
        SD35,
        "DiffusionNFT, config/nft.py, train_nft_sd3.py",
        {
            **_TEN,
            **_UNGUIDED,
            "train.objective_options": {"beta": 1.0, **_NODES},
            "train.draws": 9,
            "train.zero_advantage": "drop",
            "train.advantage_std": "global",
            "train.beta": 1e-4,
            "train.behaviour_ramp": (0.0, 0.001, 0, 0.5),
            "updates_per_iteration": 1,
        },
    ),
    Differs(
        "diffusion_nft",
        SD35,
        "the same",
        "",
        "sampled by a second-order solver",
        "Euler's ODE",
        "the method takes samples of any solver",
    ),
    Same(
        "awm",
        SD35,
        "AWM's code, arXiv 2509.25050",
        {
            **_UNGUIDED,
            "group_size": 24,
            "prompts_per_iteration": 24,
            "sample.num_steps": 14,
            "train.learning_rate": 3e-4,
            "train.clip_range": 1.0,
            "train.draws": 6,
            "train.objective_options": {
                "sigma": "stratified",
                "node_min": 0.01,
                "node_max": 0.9,
            },
            "train.ema_decay": 0.99,
            "train.behaviour_ramp": (0.0, 0.001, 0, 0.3),
            "updates_per_iteration": 1,
        },
    ),
    Differs(
        "awm",
        SD35,
        "the same",
        "",
        "sampled by the SA-Solver",
        "Euler's ODE",
        "the method takes samples of any solver",
    ),
    Same(
        "dgpo",
        SD35,
        "DGPO, config/dgpo_wocfg.py general_ocr_sd3, train_sd3_dgpo.py",
        {
            **_UNGUIDED,
            "group_size": 24,
            "sample.num_steps": 10,
            "train.draws": 4,
            "train.objective_options": {"beta": 100.0, **_NODES, "node_max": 0.6},
            "train.clip_range": 1e-3,
            "train.behaviour_ramp": (0.0, 0.001, 0, 0.3),
            "train.zero_advantage": "count",
            "updates_per_iteration": 1,
        },
    ),
    Differs(
        "dgpo",
        SD35,
        "the same",
        "train.beta",
        "0.02, to a model guided at 4.5, which the gate compares with too",
        0.001,
        "the paper's, to the plain model",
    ),
    Differs(
        "dgpo",
        SD35,
        "the same",
        "",
        "sigmas are drawn once for all groups",
        "once for a group",
        "a group is what must agree",
    ),
    Differs(
        "dgpo",
        SD35,
        "the same",
        "",
        "the average samples after 200 updates",
        "from the first one",
        "until then it hardly differs from the learner",
    ),
    Same(
        "crd",
        SD35,
        "arXiv 2603.14128 and its code",
        {
            **_TEN,
            **_UNGUIDED,
            "train.draws": 20,
            "train.beta": 0.1,
            "train.kl_guidance_scale": 4.5,
            "train.kl_floor": 1e-3,
            "train.behaviour_ramp": (0.25, 0.005, 0, 0.999),
            "updates_per_iteration": 2,
        },
    ),
    Differs(
        "crd",
        SD35,
        "the same",
        "",
        "two averages: one samples, one is compared with",
        "one for both, by the ramp of the second",
        "a third copy of what learns for one row",
    ),
    Same(
        "orw_cfm_w2",
        SD35,
        "arXiv 2502.06061",
        {**_UNGUIDED, "train.kl_form": "velocity", "train.behaviour": "copy"},
    ),
    Differs(
        "orw_cfm_w2",
        SD35,
        "the same",
        "",
        "exp(tau r), tau by task",
        "tau 5, weight of the bound .1",
        "their tables are of other models",
    ),
    Same(
        "online_dpo",
        SD35,
        "flow_grpo, config/dpo.py, train_sd3_dpo.py",
        {**_BASELINE, "train.objective_options": {"beta": 100.0, **_LOGIT_NORMAL}},
    ),
    Same(
        "rwr",
        SD35,
        "flow_grpo, config/sft.py, train_sd3_sft.py",
        {**_BASELINE, "train.objective_options": {"weight": "reward", **_LOGIT_NORMAL}},
    ),
    Same(
        "sft",
        SD35,
        "flow_grpo, config/sft.py, train_sd3_sft.py",
        {**_BASELINE, "train.objective_options": {"weight": "one", **_LOGIT_NORMAL}},
    ),
    *(
        Differs(
            name, SD35, "the same", "sample.plan", "all, noise .7", "ode", _SDE_BASELINE
        )
        for name in ("online_dpo", "rwr", "sft")
    ),
    Differs(
        "sft",
        SD35,
        "the same",
        "",
        "all that tie for the best; the others count in the mean with weight 0",
        "one of them, and the mean is over it",
        "Adam does not see the scale; whoever ties is as good",
    ),
)


def table() -> str:
    """The section of the page: one line for what is alike, one for each difference."""
    lines = [
        TITLE,
        "",
        "What the authors ran (in their repository, or the paper), on the model that they "
        "trained: `--config=FILE:model=MODEL,recipe=ROW`.",
        "Written by `python -m tests.authors`; `tests/test_recipe_authors.py` holds every "
        "value against the row.",
        "",
        "| recipe | authors' value | source | ours, and why |",
        "|---|---|---|---|",
    ]
    for one in ENTRIES:
        where = f"{one.recipe}, {one.model}"
        if isinstance(one, Same):
            values = ", ".join(f"`{k}` {_told(v)}" for k, v in one.values.items())
            lines.append(f"| {where} | {values} | {one.source} | same |")
        else:
            key = f"`{one.key}` " if one.key else ""
            lines.append(
                f"| {where} | {key}{_told(one.authors)} | {one.source} | "
                f"{_told(one.ours)}: {one.why} |"
            )
    return "\n".join(lines) + "\n"


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_told(held)}" for key, held in value.items())
    return "none" if value == () else str(value)


def section(page: str) -> str:
    """What the page has of it; empty where it has nothing."""
    found = re.search(rf"^{TITLE}$.*?(?=^## |\Z)", page, re.M | re.S)
    return found.group() if found else ""


if __name__ == "__main__":
    text = PAGE.read_text()
    PAGE.write_text(text.replace(section(text), table() + "\n"))
