"""Modules that execute tensor networks, independent of formats."""
