"""Every unit, looked at before any of them starts: by the checks of `main` itself."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from flowgrpo_jax import assemble, cli, estimate
from flowgrpo_jax.assemble import specs
from flowgrpo_jax.config import checks, families
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.runtime import paths
from launch.units import Unit


def check(units: Sequence[Unit]) -> dict[int, ConfigDict]:
    """Each unit's config; UserError that begins with the number of the first wrong one.

    What `main` checks before it loads weights. Files of a model that are not here are
    not looked for: a unit may run elsewhere.
    """
    _on_the_host()
    found: dict[int, ConfigDict] = {}
    planned: set[str] = set()
    for unit in units:
        try:
            found[unit.wid] = config = config_of(unit.words)
            if (key := _without_seed(config)) not in planned:
                _plan(config)
                planned.add(key)
        except UserError as error:
            raise UserError(f"unit {unit.wid}: {error}") from error
    return found


def config_of(words: Sequence[str]) -> ConfigDict:
    """The config of a command line of `main`; UserError for what `main` would refuse."""
    values = flags.FlagValues()
    argv = ["main", *words]
    holder = config_flags.DEFINE_config_file(
        "config", None, flag_values=values, sys_argv=argv
    )
    flags.DEFINE_string("model", None, "", values)
    cli.parse(values, argv)
    config = cli.required_config(holder)
    checks.check(config)
    return config


def refused(
    configs: Mapping[int, ConfigDict], topology: str
) -> Iterator[tuple[int, str]]:
    """(unit, the line of `estimate`) for each unit that does not fit these chips.

    Units that differ in values that cost nothing are estimated once.
    """
    _on_the_host()
    known: dict[str, str] = {}
    for wid, config in configs.items():
        if (key := _without_seed(config)) not in known:
            try:
                known[key] = estimate.fit(config, topology)
            except UserError as error:
                known[key] = str(error)
        if not known[key].startswith("fits"):
            yield wid, known[key]


def _on_the_host() -> None:
    """Chips of this machine are the units': the launcher takes none of them."""
    jax.config.update("jax_platforms", "cpu")


def _plan(config: ConfigDict) -> None:
    """All of the run that can be made without weights and devices."""
    if _is_here(config):
        shape = specs.mesh_shape(config)
        count = math.prod(size for size in shape.values() if size > 0)
        mesh = meshes.make_abstract_mesh(shape, count)
        assemble.make_work(config, mesh, *assemble.abstract_model(config))


def _is_here(config: ConfigDict) -> bool:
    """Whether the model's networks are known without a file, or its files are here."""
    family = families.of(config.model)
    if family.embedded or paths.local(config.model).exists():
        return True
    return bool(family.aliases.get(config.model)) and not config.model_path


def _without_seed(config: ConfigDict) -> str:
    return json.dumps(config.to_dict() | {"seed": 0}, sort_keys=True, default=str)
