"""Removing what matters least: entries, channels and heads."""
