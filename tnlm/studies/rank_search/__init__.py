"""Searches that try a compression on the model and measure what comes of it."""
