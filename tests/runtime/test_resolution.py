"""Sizes as a config or a prompt file says them."""

import pytest

from flowgrpo_jax.runtime import resolution


@pytest.mark.parametrize(
    "said, size",
    [
        (0, None),
        ("0", None),
        (512, (512, 512)),
        ("512", (512, 512)),
        ("768x1344", (768, 1344)),  # height first
        ("8192x1", (8192, 1)),
    ],
)
def test_what_is_meant(said, size):
    """Oracle: by hand."""
    assert resolution.parse(said) == size


@pytest.mark.parametrize(
    "said",
    [
        *(-1, 8193, True, None, 512.0, (768, 1344), "", "00", "0x512", "512x0", "x512"),
        *("512x", "768X1344", " 512", "512\n", "768x1344x3", "٣", "9000x1", "9" * 5000),
    ],
)
def test_what_is_no_size(said):
    """Oracle: the contract; and it says what is one."""
    with pytest.raises(ValueError, match="HEIGHTxWIDTH such as 768x1344"):
        resolution.parse(said)


def test_a_size_is_written_as_it_is_read():
    """Oracle: a round trip."""
    size = resolution.Size(768, 1344)
    assert resolution.parse(str(size)) == size
