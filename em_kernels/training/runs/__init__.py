"""A run on disk: its records, checkpoints, and what tracks it elsewhere."""
