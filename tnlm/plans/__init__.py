"""Plans of a compression, and reports of what it achieved."""
