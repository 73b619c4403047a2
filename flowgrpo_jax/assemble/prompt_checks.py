"""What must hold for the prompts of a run before it begins, and what is worth a line."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models import text
from flowgrpo_jax.models.files import tokenizers
from flowgrpo_jax.rewards import registry


def check(
    names: Iterable[str],
    context: registry.Context,
    prompts: Sequence[Prompt],
    source: str,
    key: str = "prompts",
) -> None:
    """UserError for the first prompt that one of these rewards cannot score.

    `source` is the value of `key`: a prompt set, or a file, whose line is then named.
    A reward tells by its `check_prompt`: a function of a prompt that raises ValueError
    with what goes on from "the prompt".
    """
    for name in names:
        check_prompt = getattr(registry.make(name, context), "check_prompt", None)
        if check_prompt is None:
            continue
        for prompt in prompts:
            try:
                check_prompt(prompt)
            except ValueError as error:
                where = f"{key}: {source}"
                if Path(source).suffix:
                    where += f":{prompt.index + 1}"
                raise UserError(
                    f"{where}: reward {name}: the prompt {prompt.text[:60]!r} {error}"
                ) from error


def notes(
    tokenizer: text.Tokenizer | None,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
) -> list[str]:
    """Lines to be told of prompts that can be used, though not as one may think.

    `tokenizer` is an embedded model's, else None; `prompts` are those of training.
    """
    told = []
    trained = {prompt.text for prompt in prompts}
    if both := sum(prompt.text in trained for prompt in held_out):
        told.append(
            f"warning: eval.prompts: {both} of {len(held_out)} are in prompts too: "
            "scores on them are not held out"
        )
    for key, some in (("prompts", prompts), ("eval.prompts", held_out)):
        texts = list(dict.fromkeys(prompt.text for prompt in some))
        if tokenizer is not None and texts:
            told += _unread(tokenizer, texts, key)
    return told


def cut(
    encoders: text.PromptEncoders | None,
    names: Iterable[str],
    context: registry.Context,
    prompts: Sequence[str],
    key: str,
) -> list[str]:
    """A line for each text encoder that does not read all of the prompts.

    Of the model, and of those rewards whose networks read the prompt. Encoders of the
    same tokens and length share a line.
    """
    readers = [] if encoders is None else encoders.readers()
    for name in names:
        reader = getattr(registry.make(name, context), "reader", None)
        if isinstance(reader, text.Reader):  # a reader of pictures is another thing
            encoder = f"{reader.encoder} of the reward {name}"
            readers.append(dataclasses.replace(reader, encoder=encoder))
    texts = list(dict.fromkeys(prompts))
    alike: dict[tuple[str | int, int], list[text.Reader]] = {}
    for reader in readers:
        what = (tokenizers.identity(reader.tokenizer), reader.limit)
        alike.setdefault(what, []).append(reader)
    told = []
    for (_, limit), some in alike.items():
        if tokens := tokenizers.longer(some[0].tokenizer, texts, limit):
            such = max(tokens, key=lambda one: tokens[one])
            told.append(
                f"warning: {key}: {len(tokens)} of {len(texts)} prompts lose tokens in "
                f"{' and '.join(reader.encoder for reader in some)} (at most "
                f"{tokens[such] - limit} of {tokens[such]} tokens cut), such as "
                f"{such[:60]!r}"
            )
    return told


def _unread(tokenizer: text.Tokenizer, texts: Sequence[str], key: str) -> list[str]:
    """What an embedded model does not read of its prompts."""
    length = tokenizer.max_length
    longer = dataclasses.replace(tokenizer, max_length=length + 1)  # type: ignore
    ids = longer(texts)
    told = []
    for found, what in (
        (ids[:, -1] != text.PAD, f"cut: the model reads {length} words or letters"),
        ((ids == text.UNKNOWN).any(axis=1), "with words that the model does not know"),
    ):
        if found.any():
            such = texts[int(found.argmax())][:60]
            told.append(
                f"warning: {key}: {found.sum()} of {len(texts)} are {what}, such as "
                f"{such!r}"
            )
    return told
