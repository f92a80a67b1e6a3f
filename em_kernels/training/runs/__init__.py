"""A run on disk: records, checkpoints, merged adapters; and trackers."""
