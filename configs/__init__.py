"""The samplers, and a file per task."""
