"""Modules that execute tensor networks; they know no format by name."""
