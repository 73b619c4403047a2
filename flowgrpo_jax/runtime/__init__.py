"""Mesh, checkpoint, metrics, report: knows pytrees, not algorithms."""
