"""Helpers for all parts of the library; they import nothing of it but the errors."""
