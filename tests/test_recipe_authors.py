"""Rows against what their authors run: each number with the file or paper it is from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import specs
from flowgrpo_jax.config import checks, recipes
from flowgrpo_jax.engine.planner import Planner
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import packing, plan
from flowgrpo_jax.models.flow_model import FlowModel
from flowgrpo_jax.rl import losses
from flowgrpo_jax.rl.objectives.noised import SampleElements
from flowgrpo_jax.rl.objectives.table import OBJECTIVES
from tests import toy

# Guidance on SD3.5-M: of sampling, of the loss, of evaluation.
GUIDANCE = {
    # flow_grpo, config/grpo.py: geneval_sd3 4.5, 4.5; geneval_sd3_fast_nocfg 1, 1;
    # pickscore_sd3_fast (the release of 2025-07) 4.5; its loss guides as the rollout.
    "flow_grpo": (4.5, 4.5, 4.5),
    "flow_grpo_fast": (1.0, 1.0, 1.0),
    "flow_grpo_fast_v1": (4.5, 4.5, 4.5),
    # flow_grpo, config/grpo_guard.py: geneval_sd3_rationorm 4.5
    "grpo_guard": (4.5, 4.5, 4.5),
    # UniRL's Flow-DPPO (arXiv 2606.11025): CFG 1
    "flow_dppo": (1.0, 1.0, 1.0),
    # CFG-free: arXiv 2509.16117, 2509.25050, 2510.08425, 2603.14128 and their code
    "diffusion_nft": (1.0, 1.0, 1.0),
    "awm": (1.0, 1.0, 1.0),
    "dgpo": (1.0, 1.0, 1.0),
    "crd": (1.0, 1.0, 1.0),
    # The flow itself, arXiv 2502.06061
    "orw_cfm_w2": (1.0, 1.0, 1.0),
    # flow_grpo, config/dpo.py and config/sft.py, train_sd3_dpo.py and train_sd3_sft.py:
    # guided samples, and the plain velocity in the loss
    "online_dpo": (4.5, 1.0, 4.5),
    "rwr": (4.5, 1.0, 4.5),
    "sft": (4.5, 1.0, 4.5),
}


@pytest.mark.parametrize("recipe", GUIDANCE)
def test_guidance_on_sd35(recipe):
    """Oracle: the table above; what a row says of guidance no layer takes back."""
    config = configs.make(f"model=sd3.5-medium,recipe={recipe}")
    checks.check(config)
    loss = config.train.guidance_scale or config.sample.guidance_scale
    held = (config.sample.guidance_scale, loss, config.eval.guidance_scale)
    assert held == GUIDANCE[recipe]


def test_every_row_that_learns_from_samples_has_its_guidance_told():
    """Oracle: the objectives; others must guide as the rollout did."""
    for name in recipes.RECIPES:
        row = OBJECTIVES[configs.make(recipe=name).train.objective]
        if row.consumes == "samples" and name != "pretrain":
            assert name in GUIDANCE and GUIDANCE[name][1] == 1.0


@pytest.mark.parametrize("scale, asked", [(1.0, 3), (0.0, 6), (4.5, 6)])
def test_the_loss_has_a_guidance_of_its_own(scale, asked):
    """Oracle: images that the network is asked for; guidance asks twice of each."""
    seen = []

    class Watched(FlowModel):
        def velocity(self, variables, latents, sigma, text, guidance=None):
            seen.append(len(latents))
            return super().velocity(variables, latents, sigma, text, guidance)

    model = Watched(**vars(toy.MODEL))
    config = configs.make(
        recipe="sft", sample__guidance_scale=4.5, train__guidance_scale=scale
    )
    loss = assemble.make_loss(config, model, assemble.make_sampler(config, model))
    text = model.encode_text(toy.VARIABLES, jnp.zeros((3, 1), int))
    column = jnp.ones((3, 1))
    elements = SampleElements(
        clean=jnp.ones((3, 1, *model.latent_shape)),
        advantage=column,
        reward=column,
        noise_key=jax.random.split(jax.random.key(0), (3, 1)),
    )
    empty = jax.tree.map(lambda rows: rows[:1], text)
    loss(toy.VARIABLES, losses.Policies(), (text, empty), elements)
    assert seen == [asked]


def test_a_ratio_needs_the_guidance_of_the_rollout():
    """Oracle: the line, by hand; the sampler's own is accepted, however it is told."""
    for scale in (0.0, 4.5):
        checks.check(configs.make(train__guidance_scale=scale))
    for objective in ("flow_grpo", "g2rpo", "grpo_guard", "flow_dppo"):
        with pytest.raises(UserError, match="^train.guidance_scale: 2.0: must be 0 or"):
            checks.check(configs.make(recipe=objective, train__guidance_scale=2.0))
    config = configs.make(recipe="sft", train__guidance_scale=2.0)
    checks.check(config)


@pytest.mark.parametrize("recipe", ["dance_grpo", "branch_grpo"])
def test_the_image_is_the_last_prediction(recipe):
    """Oracle: DanceGRPO's run_sample_step (fastvideo/train_grpo_flux.py) and its heir
    BranchGRPO: `pred_original` of the last step becomes the image, which has no noise.
    """
    config = configs.make(recipe=recipe, prompts_per_iteration=2)
    checks.check(config)
    planner = Planner(specs.plan_spec(config), devices=1)
    packed = planner.pack(planner.jobs(0))
    assert not packed.tables.leaf.fresh.any()
    last = config.sample.num_steps - 1
    for job in planner.jobs(0):
        noisy = {n.at for n in job.plan.nodes if n.noise != plan.DETERMINISTIC}
        assert noisy == set(range(last + 1))  # the start, and where steps end
        assert last not in {job.plan.nodes[n].at for n, _ in job.plan.states}


def test_flow_grpos_image_keeps_the_noise_of_its_last_step():
    """Oracle: flow_grpo's sd3_pipeline_with_logprob.py, which adds it at every step."""
    config = configs.make(recipe="flow_grpo", prompts_per_iteration=2)
    planner = Planner(specs.plan_spec(config), devices=1)
    leaf = planner.pack(planner.jobs(0)).tables.leaf
    assert isinstance(leaf, packing.Steps) and leaf.fresh.all()


def test_a_tree_trains_all_but_its_last_step():
    """Oracle: the fraction 1 is as many steps as have noise."""
    whole, most = (
        Planner(
            specs.plan_spec(
                configs.make(recipe="branch_grpo", train__timestep_fraction=f)
            ),
            1,
        )
        for f in (1.0, 0.95)
    )
    assert whole.plan(0, 0) == most.plan(0, 0)


def test_awm_as_released():
    """Oracle: AWM's code (arXiv 2509.25050): clip 1, one update, EMA .99, and the KL's
    average min(.3, .001 n)."""
    config = configs.make("model=sd3.5-medium,recipe=awm")
    assert config.train.clip_range == 1.0 and config.updates_per_iteration == 1
    assert (config.train.ema_decay, config.train.ema_beta) == (0.99, 1.0)
    average = assemble.make_behaviour(config)
    kept = average.keep(jnp.array([1, 100, 300, 1000]))
    np.testing.assert_allclose(kept, [0.001, 0.1, 0.3, 0.3], rtol=1e-5)


def test_awm_samples_from_the_learner_and_compares_with_the_average(monkeypatch):
    """Oracle: invariances; the evaluation's EMA, made NaN, reaches nothing, and the
    penalty is 0 where the average is the learner and not where it is moved."""
    run = toy.make_run(
        monkeypatch, "awm", prompts_per_iteration=2, group_size=4, microbatch=8
    )
    start = run.initial_state()
    assert run.work.sampling_part(start) is start.trainable
    blank = jax.tree.map(lambda x: x * jnp.nan, start.ema)
    state, first = run.step(start.replace(ema=blank), 0)
    assert first["ema_kl_loss"] == 0.0 and first["ratio_gap"] == 0.0
    assert np.isfinite(state.trainable["transformer"]["mean"]).all()
    start = run.initial_state()
    moved = jax.tree.map(lambda x: x + 1.0, start.behaviour)
    _, second = run.step(start.replace(behaviour=moved), 0)
    assert second["ema_kl_loss"] > 0 and second["ratio_gap"] == 0.0


def test_guard_divides_by_the_std_of_a_group():
    """Oracle: flow_grpo, config/grpo_guard.py: global_std False in all three configs,
    clip 2e-6 (GenEval, OCR), learning rate 1e-4, beta 0."""
    config = configs.make("model=sd3.5-medium,recipe=grpo_guard")
    assert config.train.advantage_std == "group"
    assert config.train.clip_range == 2e-6 and config.train.beta == 0.0
    assert config.train.learning_rate == 1e-4
