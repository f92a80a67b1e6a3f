"""Completions sampled from a model or a server."""
