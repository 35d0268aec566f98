"""Directories that hold models: how they are written, and what they must be to be read."""
