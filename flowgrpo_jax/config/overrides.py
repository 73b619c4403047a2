"""A command line, checked before absl parses it: one line for whatever is wrong.

absl and ml_collections name neither the whole key nor what is allowed ("'bta'"), so
the flags that set config keys are read here first.
"""

import ast
import difflib
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import tuple_parser

from flowgrpo_jax.config import keys, recipes
from flowgrpo_jax.errors import UserError, not_one_of, shown
from flowgrpo_jax.runtime import paths, resolution

# Dotted key, the text after "=" if there is one, the next word of the command line.
Override = tuple[str, str | None, str | None]
_BOOLS = ("true", "t", "1", "false", "f", "0")  # those of absl


# Flags that are paths, or may be.
_PATHS = ("config", "workdir", "output", "prompts_file", "prompts", "model", "table")


def at_home(argv: Sequence[str]) -> list[str]:
    """The words with `~` in flags that are paths as the home folder.

    The shell does so for a word that begins with it, but not behind a `=`.
    """
    names = "|".join(_PATHS)
    words, flag = [], ""
    for word in argv:
        if match := re.fullmatch(rf"(--?(?:{names})=)(~.*)", word, re.DOTALL):
            word = match[1] + str(paths.local(match[2]))
        elif flag and word.startswith("~"):
            word = str(paths.local(word))
        flag = word if re.fullmatch(rf"--?(?:{names})", word) else ""
        words.append(word)
    return words


def installed(source: str) -> str:
    """The same config from where the package is installed, if it is not here.

    `source` is FILE.py or FILE.py:argument; one that is here, or nowhere, stays as it
    is.
    """
    path, colon, argument = source.partition(":")
    name = PurePath(path)
    if name.parts[:1] != ("configs",) or Path(path).exists():
        return source
    package = Path(__file__).parents[1]
    # A wheel has them within the package (see setup.py), a checkout beside it.
    for folder in (package / "configs", package.parent / "configs"):
        file = folder.joinpath(*name.parts[1:])
        if file.is_file():
            return f"{file}{colon}{argument}"
    return source


def from_package(argv: Sequence[str]) -> list[str]:
    """The words with the package's own file in --config, where it is not here."""
    words = list(argv)
    for place, word in enumerate(words):
        if match := re.fullmatch(r"(--?config)(?:=(.*))?", word, re.DOTALL):
            value = match[2]
            if value is not None:
                words[place] = f"{match[1]}={installed(value)}"
            elif place + 1 < len(words):
                words[place + 1] = installed(words[place + 1])
    if words != list(argv):
        print(f"config: {_config_source(words)}: the package's own", file=sys.stderr)
    return words


def check(argv: Sequence[str]) -> None:
    """UserError for a --config that cannot be loaded or an override that misfits it."""
    source, overrides = _config_source(argv), list(_overrides(argv))
    if source is None:
        if overrides:
            raise UserError(
                f"--config.{overrides[0][0]}: needs --config=FILE before it"
            )
        return
    config = load_config(source)
    for key, text, following in overrides:
        current = keys.get(config, key)
        if text is None and not isinstance(current, bool):
            text = following
        if key == "recipe":
            raise _recipe_override(source, text)
        if wanted := _wanted(key, current, text):
            raise UserError(f"{key}: {shown(text)}: {wanted}")


def from_file(
    flag: str, path: str, function: str, arguments: Sequence[Any], like: str
) -> Any:
    """What a function of a user's Python file gives, which may do anything.

    UserError that begins with the flag and says what the file must be `like`.
    """
    try:
        found = runpy.run_path(path)
        if function not in found:
            raise UserError(
                f"{flag}: {path}: has no function {function}: give a Python file with "
                f"{like}"
            )
        return found[function](*arguments)
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"{flag}: {path}: {(error.strerror or str(error)).lower()}: give a Python "
            f"file with {like}"
        ) from error
    except Exception as error:
        raise UserError(
            f"{flag}: {path}: {type(error).__name__}: {error}: must be a Python file "
            f"with {like}"
        ) from error


def load_config(source: str) -> ConfigDict:
    """What `FILE.py` or `FILE.py:argument` gives; UserError for anything but a config.

    A file of configs/ that is not here is the package's own.
    """
    path, colon, argument = installed(source).partition(":")
    arguments = (argument,) if colon else ()
    like = "get_config(arg), such as configs/geneval.py"
    config = from_file("--config", path, "get_config", arguments, like)
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config: {path}: its get_config gives {type(config).__name__}: must "
            "be a ConfigDict, such as flowgrpo_jax.config.make(arg)"
        )
    return config


def unknown_flag(error: flags.UnrecognizedFlagError, known: Sequence[str]) -> UserError:
    """The line for a flag that the command does not have."""
    near = difflib.get_close_matches(error.flagname, known, 1)
    names = ", ".join(f"--{name}" for name in near or known)
    return UserError(
        f"--{error.flagname}: unknown flag: "
        + (f"did you mean {names}?" if near else f"must be one of {names}")
    )


def wrong_value(told: str) -> UserError:
    """absl's "flag --seed=x: invalid literal for int() ..." as a line of ours."""
    for theirs, ours in (
        (r"invalid literal for int.*", "must be a whole number"),
        (r"Exceeds the limit.*", "must be a whole number"),
        (r"could not convert string to float.*", "must be a number"),
        (r"[^:]+", ""),
    ):
        if match := re.fullmatch(
            rf"(?:flag )?--(\w+)=(.*): ({theirs})", told, re.DOTALL
        ):
            name, value, reason = match.groups()
            return UserError(f"--{name}: {shown(value)}: {ours or reason}")
    return UserError(told)


def _config_source(argv: Sequence[str]) -> str | None:
    """The last value of --config."""
    source = None
    for arg, following in zip(argv, [*argv[1:], None], strict=True):
        if match := re.fullmatch(r"--?config(?:=(.*))?", arg):
            source = match[1] if match[1] is not None else following
    return source


def _overrides(argv: Sequence[str]) -> Iterator[Override]:
    """All --config.key=value, --config.key value and --[no]config.key."""
    for arg, following in zip(argv, [*argv[1:], None], strict=True):
        if match := re.fullmatch(r"--?(no)?config\.([^=]*)(?:=(.*))?", arg, re.DOTALL):
            yield match[2], match[3], following


def _recipe_override(source: str, name: str | None) -> UserError:
    path = source.partition(":")[0]
    return not_one_of(
        "recipe",
        name,
        recipes.RECIPES,
        f", chosen with --config={path}:recipe=NAME, since a recipe sets other keys",
    )


def _wanted(key: str, current: Any, text: str | None) -> str | None:
    """What must stand in place of `text`; None if it will do."""
    if isinstance(current, bool):
        fits = text is None or text.lower() in _BOOLS
        return None if fits else "must be true or false"
    if text is None:
        return f"must have a value: --config.{key}=..."
    if key == "resolution":
        # absl would read 0x512 as another number.
        return (
            None if _parses(resolution.parse, text) else f"must be {resolution.WANTED}"
        )
    if isinstance(current, ConfigDict):
        given = _literal(text)
        # An empty one takes anything that can be read: `values` looks at it.
        if key.startswith(tuple(keys.OPEN)) and isinstance(given, dict):
            dotted = any("." in str(name) for name in given)
            return (
                "name it in a config file: here it cannot have dots" if dotted else None
            )
        return f"is a group: set --config.{key}.{next(iter(current), 'NAME')}=..."
    if isinstance(current, int):
        fits = _parses(int, text, 0)
        return None if fits else f"must be a whole number, such as {current}"
    if isinstance(current, float):
        fits = _parses(float, text)
        return None if fits else f"must be a number, such as {current}"
    if isinstance(current, tuple):
        fits = _parses(tuple_parser.TupleParser().parse, text)
        return None if fits else f"must be a tuple, such as {_example(current)}"
    return None


def _example(current: tuple) -> str:
    shown = current or (0, 1)
    return f"({', '.join(map(repr, shown))}{',' * (len(shown) == 1)})"


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _parses(kind: Callable, *arguments: Any) -> bool:
    try:
        kind(*arguments)
    except (ValueError, TypeError, MemoryError, RecursionError):
        return False
    return True
