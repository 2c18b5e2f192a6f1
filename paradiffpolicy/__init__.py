"""Diffusion policies in real time: parallel-in-time sampling inside a fixed-rate control loop."""

__version__ = "0.1.0"
