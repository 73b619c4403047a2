"""The GenEval prompts of this world: those to train on and those held out."""

from flowgrpo_jax.data.geneval_grammar import Vocabulary
from flowgrpo_jax.data.prompt_sets import PromptSet
from flowgrpo_jax.worlds.sprites import world

VOCABULARY = Vocabulary(classes=world.SHAPES, colors=world.COLORS, colorless=())
# As in the benchmark, nothing trains on single_object. 521 prompts are held out.
PROMPTS = PromptSet(
    "sprites",
    VOCABULARY,
    num_train=6_800,
    test_fraction={
        "single_object": 1.0,
        "two_object": 0.2,
        "counting": 0.2,
        "colors": 0.2,
        "position": 0.5,
        "color_attr": 0.55,
    },
)
