"""The embedded worlds: scenes, captions, painter, oracle, shipped weights. No other models."""
