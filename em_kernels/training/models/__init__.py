"""Adapters, rounding to bf16, the demo model."""
