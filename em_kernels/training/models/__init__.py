"""Loading of models, LoRA adapters, rounding to bf16, the demo model."""
