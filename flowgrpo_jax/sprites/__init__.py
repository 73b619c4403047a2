"""The embedded world: scenes, captions, detector, shipped weights."""
