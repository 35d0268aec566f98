"""Compressed models on disk: how they are written, checked and read."""
