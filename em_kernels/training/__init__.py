"""One-shot Entropy Minimization on a transformers model."""
