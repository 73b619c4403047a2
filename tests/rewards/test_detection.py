"""The types between detectors and rewards."""

import numpy as np

from flowgrpo_jax.rewards.detection import Detection, Detector


def test_detections_are_values():
    """Oracle: equality of fields; a mask is left out (arrays have no truth)."""
    box = (0.0, 0.0, 2.0, 2.0)
    mask = np.ones((4, 4), bool)
    assert Detection("cat", 0.5, box, mask=mask) == Detection("cat", 0.5, box)
    assert Detection("cat", 0.5, box) != Detection("cat", 0.5, box, "red")
    assert len({Detection("cat", 0.5, box), Detection("cat", 0.5, box)}) == 1


def test_any_callable_is_a_detector():
    """Oracle: the protocol's runtime check."""
    assert isinstance(lambda images: [[] for _ in images], Detector)
    assert not isinstance("detector", Detector)
