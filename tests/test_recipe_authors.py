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
from flowgrpo_jax.flow import packing, plan, schedule
from flowgrpo_jax.models.flow_model import FlowModel
from flowgrpo_jax.rl import losses
from flowgrpo_jax.rl.objectives import sigma_draws
from flowgrpo_jax.rl.objectives.noised import SampleElements
from flowgrpo_jax.rl.objectives.table import OBJECTIVES
from tests import authors, toy

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
        sample_key=jax.random.split(jax.random.key(0), (3, 1)),
        draw=jnp.zeros((3, 1), int),
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


def of_row(one, key):
    """The value of a key in a row on the model that its authors trained."""
    value = configs.get(configs.make(f"model={one.model},recipe={one.recipe}"), key)
    return value.to_dict() if hasattr(value, "to_dict") else value


@pytest.mark.parametrize(
    "one",
    [one for one in authors.ENTRIES if isinstance(one, authors.Same)],
    ids=lambda one: f"{one.recipe}-{one.model}",
)
def test_rows_have_their_authors_values(one):
    """Oracle: the authors' repositories and papers, by the source of the entry."""
    checks.check(configs.make(f"model={one.model},recipe={one.recipe}"))
    assert {key: of_row(one, key) for key in one.values} == one.values


def test_what_differs_is_what_the_page_says():
    """Oracle: the row; a value that was mended may not be told as a difference."""
    for one in authors.ENTRIES:
        if isinstance(one, authors.Differs) and one.key:
            assert of_row(one, one.key) == one.ours != one.authors


def test_every_row_is_told_and_the_page_is_the_table():
    """Oracle: the table of recipes, and `python -m tests.authors`."""
    told = {one.recipe for one in authors.ENTRIES if isinstance(one, authors.Same)}
    assert told == set(recipes.RECIPES) - {"pretrain"}
    assert authors.section(authors.PAGE.read_text()).strip() == authors.table().strip()


def sigmas_of(recipe, samples=400):
    """[sample, draw] sigmas at which a row of SD3.5-M noises its samples."""
    config = configs.make(f"model=sd3.5-medium,recipe={recipe}")
    options = OBJECTIVES[config.train.objective].options(
        **config.train.objective_options.to_dict()
    )
    draws = config.train.draws
    nodes = tuple(schedule.shifted_grid(config.sample.num_steps, 3.0).tolist())
    keys = jax.random.split(jax.random.key(1), samples)

    def draw(key, number):
        own = jax.random.split(jax.random.fold_in(key, number), 3)
        place = sigma_draws.Draw(own, key, number)
        return sigma_draws.sigma_in_range(place, options, nodes, draws)

    every = jax.vmap(jax.vmap(draw, (None, 0)), (0, None))
    return nodes, np.asarray(jax.jit(every)(keys, jnp.arange(draws)))


def test_nft_noises_at_the_samplers_nodes():
    """Oracle: train_nft_sd3.py: nine of the ten timesteps, in random order for every
    sample; their mean is .66, where a uniform sigma's is .5."""
    nodes, sigmas = sigmas_of("diffusion_nft")
    assert sigmas.shape[1] == 9
    assert set(np.unique(sigmas)) == set(np.float32(nodes[:-1]))
    assert all(len(set(row)) == 9 for row in sigmas)
    left_out = [np.setdiff1d(np.float32(nodes[:-1]), row)[0] for row in sigmas]
    counts = np.unique(left_out, return_counts=True)[1]
    assert len(counts) == 10 and counts.min() > 15  # 40 +- 6 each
    np.testing.assert_allclose(sigmas.mean(), 0.658, atol=0.005)


def test_dgpo_noises_at_the_first_nodes():
    """Oracle: train_sd3_dgpo.py: 4 different ones of the timesteps 0 .. trunc_steps 6."""
    nodes, sigmas = sigmas_of("dgpo")
    assert set(np.unique(sigmas)) == set(np.float32(nodes[:7]))
    assert all(len(set(row)) == 4 for row in sigmas)


def test_awm_noises_in_strata():
    """Oracle: AWM (arXiv 2509.25050): six strata of the first 90% of 14 steps, without
    the first one: nodes 1 to 12, two a stratum, alike often."""
    nodes, sigmas = sigmas_of("awm")
    for draw in range(6):
        values, counts = np.unique(sigmas[:, draw], return_counts=True)
        pair = np.float32(nodes[1 + 2 * draw : 3 + 2 * draw])
        np.testing.assert_allclose(np.sort(values), np.sort(pair), rtol=1e-6)
        assert counts.min() > 150  # of 400: 200 +- 10


@pytest.mark.parametrize("recipe", ["online_dpo", "rwr", "sft"])
def test_baselines_noise_as_sd3_is_trained(recipe):
    """Oracle: train_sd3_dpo.py and train_sd3_sft.py index timesteps that are shifted by
    3 with a logit-normal number: the median is 3 * .5 / (1 + 2 * .5)."""
    _, sigmas = sigmas_of(recipe)
    assert sigmas.shape[1] == 39
    np.testing.assert_allclose(np.median(sigmas), 0.75, atol=0.01)
    unshifted = sigmas / (3 - 2 * sigmas)
    logit = np.log(unshifted) - np.log1p(-unshifted)
    np.testing.assert_allclose(logit.std(), 1.0, atol=0.02)


def test_more_draws_than_nodes_begin_again_and_none_is_refused():
    """Oracle: counting; and the line, by hand."""
    options = sigma_draws.SigmaInRange(sigma="nodes")
    key = jax.random.key(0)
    own = jax.random.split(key, 3)
    sigmas = [
        float(
            sigma_draws.sigma_in_range(
                sigma_draws.Draw(own, key, jnp.array(n)), options, (1.0, 0.5, 0.0), 4
            )
        )
        for n in range(4)
    ]
    assert sorted(sigmas) == [0.5, 0.5, 1.0, 1.0]
    nowhere = sigma_draws.SigmaInRange(node_min=0.6, node_max=0.9)
    with pytest.raises(UserError, match="node_min: 0.6: no step of 2 lies between"):
        sigma_draws.nodes_in_range(nowhere, (1.0, 0.5, 0.0))


def test_who_has_no_advantage_leaves_the_mean_or_not(monkeypatch):
    """Oracle: train_sd3.py filters, train_flux.py and DanceGRPO average over all: where
    half the samples tie, the mean over all has half the gradient."""
    norms = {}
    for how, counted in (("drop", 4), ("count", 8)):
        run = toy.make_run(
            monkeypatch,
            "dance_grpo",
            scores=half_ties,
            prompts_per_iteration=2,
            group_size=4,
            updates_per_iteration=1,
            microbatch=8,
            train__zero_advantage=how,
            train__max_grad_norm=0.0,
        )
        _, metrics = run.step(run.initial_state(), 0)
        assert metrics["actual_batch_size"] == counted * 9  # 60% of 15 steps
        norms[how] = metrics["grad_norm"]
    np.testing.assert_allclose(norms["drop"], 2 * norms["count"], rtol=1e-4)


def half_ties(images, prompts):
    """The first group's rewards differ, the second's do not."""
    del prompts
    number = np.arange(len(images))
    return {"geneval": np.where(number < 4, number, 0.0)}


def test_rewards_that_failed_never_count():
    """Oracle: definition; no score is not an advantage of 0."""
    spec = specs.update_spec(configs.make(recipe="g2rpo"))
    assert spec.count_zeros
    weight = spec.weight(np.array([0.0, 1.0, np.nan]))
    np.testing.assert_array_equal(weight, [1.0, 1.0, 0.0])
