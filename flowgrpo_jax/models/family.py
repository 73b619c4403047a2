"""What a family of models has to say: a row of plain data, and its code behind it.

A family is a folder (`models/<family>/`, or the embedded worlds), a row of a table and
its tests. The row needs no networks, so a config is made without importing any.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

if TYPE_CHECKING:  # a row must not import jax
    from jax.typing import DTypeLike

    from flowgrpo_jax.models.files.lora_files import Adapter
    from flowgrpo_jax.models.flow_model import FlowModel, Variables
    from flowgrpo_jax.models.spec import ModelSpec


@runtime_checkable
class Code(Protocol):
    """What a family does with its networks and files: `CODE` of its module."""

    def find(self, spec: "ModelSpec") -> Path:
        """Where the model's files lie; what is not on this machine is downloaded.

        UserError if there is no such model.
        """
        ...

    def plan(self, spec: "ModelSpec", place: Path | None) -> "FlowModel":
        """The networks that the files at `place` describe, without weights.

        Without a place those of a released model: `name` is one of the row's aliases.
        """
        ...

    def shapes(self, model: "FlowModel", weights: "DTypeLike") -> "Variables":
        """Shapes of all variables; `weights` is the type of the transformer's."""
        ...

    def read(self, place: Path, model: "FlowModel", like: "Variables") -> "Variables":
        """The variables at `place`, in the types and on the devices of `like`."""
        ...

    def with_adapter(
        self, path: str, lora: "Variables", model: "FlowModel"
    ) -> "Variables":
        """A fresh `lora` tree with the weights of a LoRA file or folder in it."""
        ...

    def save_result(
        self, path: Path, variables: "Variables", model: "FlowModel"
    ) -> None:
        """Write what a run has made into its workdir, as others read it."""
        ...

    def adapter(self, variables: "Variables", model: "FlowModel") -> "Adapter":
        """The LoRA of a policy, under the names of the family's files."""
        ...

    def write_transformer(
        self, folder: Path, variables: "Variables", model: "FlowModel"
    ) -> None:
        """The transformer as a folder of diffusers, any LoRA folded in."""
        ...

    def usage(self, base: str | None, transformer: bool) -> str:
        """Python that loads an exported result; `base` is the model's hub id."""
        ...


@dataclasses.dataclass(frozen=True)
class Family:
    """One row: how models of this family are recognised, and what they are given.

    Args:
      name: one word, for messages.
      aliases: short name of a released model -> its hub id ("" for one in here).
      class_names: of the `_class_name` of a transformer's config.json.
      suffixes: of files that are models of this family.
      trained_as: whose hyperparameters of a recipe's authors it takes, by their name
        in `recipes.Recipe.authors`; "" where the recipe's own values are meant for it.
      defaults: config keys that suit it whatever the task, under the recipe's.
      sampling: config keys that its pipeline in diffusers samples with.
      embedded: whether it paints scenes of an embedded world: these have a detector of
        their own, can be pretrained here, and are no model of diffusers.
      module: the dotted name of the file that has its `Code`, as CODE.
    """

    name: str
    module: str
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    trained_as: str = ""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    embedded: bool = False

    @property
    def code(self) -> Code:
        """Imported on the first use: networks are slow to import."""
        return cast(Code, importlib.import_module(self.module).CODE)
