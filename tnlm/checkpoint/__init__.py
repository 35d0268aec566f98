"""Compressed models on disk: writes, checks and reads them."""
