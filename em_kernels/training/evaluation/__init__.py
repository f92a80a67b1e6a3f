"""Accuracy of models, choice of prompts, and studies of both."""
