"""Helpers that any part of the library may use; they import none of it but the errors."""
