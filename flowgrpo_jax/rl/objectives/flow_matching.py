"""Flow matching on data, as base models are pretrained."""

from collections.abc import Mapping
from dataclasses import dataclass

from flowgrpo_jax.rl.objectives.clipping import Clip
from flowgrpo_jax.rl.objectives.noised import Noised, SampleElements, Score, Velocity
from flowgrpo_jax.rl.objectives.sigma_draws import PretrainingSigma


@dataclass(frozen=True, kw_only=True)
class FlowMatchingOptions(PretrainingSigma):
    """Those of the draw of sigma."""


def flow_matching(
    noised: Noised,
    velocity: Velocity,
    fixed: Mapping[str, Velocity],
    elements: SampleElements,
    clip: Clip,
    options: FlowMatchingOptions,
) -> Score:
    """mean (v - (noise - clean))^2: rectified flow (arXiv 2209.03003)."""
    error = noised.error(velocity)
    return error, {"flow_matching_loss": error}
