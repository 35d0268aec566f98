"""Pruning: removes the least important entries, channels and heads."""
