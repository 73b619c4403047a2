"""Our layers under the names of diffusers' files: rename rules, and LoRA by pattern.

A family's tables map a layer of ours to the module of a file, or to the modules that
lie side by side in it (query, key and value).
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files.tensors import Rule

Layers = Mapping[str, str | tuple[str, ...]]


def layer_rules(layers: Layers, ours: str, theirs: str, first: int = 0) -> list[Rule]:
    """Kernel and bias of every layer; `ours`, `theirs`: what stands before the names.

    `first`: number of the first layer of a scanned stack ("{layer}" in `theirs`).
    """
    rules = []
    for name, parts in layers.items():
        joined = (parts,) if isinstance(parts, str) else parts
        weights = tuple(f"{theirs}{part}.weight" for part in joined)
        biases = tuple(f"{theirs}{part}.bias" for part in joined)
        rules.append(Rule(f"{ours}{name}/kernel", weights, "dense", first))
        rules.append(Rule(f"{ours}{name}/bias", biases, first=first))
    return rules


def norm_rules(
    norms: Mapping[str, str], ours: str, theirs: str, first: int = 0
) -> list[Rule]:
    """The scale of every norm."""
    return [
        Rule(f"{ours}{name}/scale", f"{theirs}{norm}.weight", first=first)
        for name, norm in norms.items()
    ]


def adapted(
    patterns: Sequence[str], groups: Mapping[str, tuple[str, Layers]], like: str
) -> tuple[str, ...]:
    """Our layers whose modules in a file the patterns name, for LoRA.

    A pattern is a regular expression of the end of a module's name from a dot on, as
    `attn\\.to_q`; it speaks of all blocks of a kind. `groups`: what stands before our
    names -> (before theirs, layers). UserError, with some names that are `like` them,
    if a pattern names nothing, or a part of a layer that is one here.
    """
    found, unused = [], set(patterns)
    for ours, prefix, layer, parts in _layers(groups):
        named = []
        for part in parts:
            by = [p for p in patterns if _matches(p, prefix + part)]
            unused -= set(by)
            named.append(bool(by))
        if any(named) and not all(named):
            raise UserError(
                f"train.lora_targets: {patterns}: {', '.join(parts)} are one layer "
                "here: name all of them or none"
            )
        if all(named):
            found.append(f"{ours}{layer}")
    for pattern in sorted(unused):
        raise UserError(
            f"train.lora_targets: {pattern}: names no layer of the transformer: they "
            f"are like {like}"
        )
    return tuple(found)


def _layers(groups) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    for ours, (prefix, layers) in groups.items():
        for layer, parts in layers.items():
            yield ours, prefix, layer, (parts,) if isinstance(parts, str) else parts


def _matches(pattern: str, module: str) -> bool:
    try:
        re.compile(pattern)  # by itself: "a)|(b" would be one within the parentheses
        return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"train.lora_targets: {pattern}: is no regular expression ({error})"
        ) from error
