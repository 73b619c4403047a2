"""Images and metadata to scores; detectors."""
