"""Nodes in ComfyUI's process, and the engine in a process beside it."""

__version__ = "0.1.0"
