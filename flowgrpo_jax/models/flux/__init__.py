"""FLUX.1 (dev, schnell): transformer, text, files. Nothing of other families."""
