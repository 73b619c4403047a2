"""Mesh, checkpoint, metrics, workdir, signals: trees of arrays. No algorithms."""
