"""Compresses models that are larger than memory, from files to files, block by block."""
