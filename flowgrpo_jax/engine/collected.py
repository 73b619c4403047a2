"""What an iteration has sampled and rated, before anything is learned from it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.engine.credit import Leaves
from flowgrpo_jax.engine.workload import PolicyWork
from flowgrpo_jax.flow.packing import Job, Packed
from flowgrpo_jax.flow.rollout import Rollout
from flowgrpo_jax.models.flow_model import Variables
from flowgrpo_jax.rl.update import UpdateBatch


class Collected(NamedTuple):
    """The samples of one iteration, and all that they came from.

    Without an `update_batch` no prompt has a reward, and `metrics` say just that.
    """

    iteration: int
    work: PolicyWork
    prompts: Sequence[Prompt]
    jobs: Sequence[Job]
    packed: Packed
    leaves: Leaves
    measured: Mapping[str, np.ndarray]  # [leaf] by name
    made: Rollout  # of all packs
    images: Sequence[np.ndarray]  # those that this process holds, in parts
    numbers: Sequence[np.ndarray]  # and their numbers among the leaves
    variables: Variables  # of the policy that sampled; an update takes their memory
    key: jax.Array
    text: Any  # embeddings, placed: a row per prompt
    empty: Any  # and that of the negative prompt
    update_batch: UpdateBatch | None = None
    metrics: Mapping[str, Any] = {}
    seconds: Mapping[str, float] = {}
