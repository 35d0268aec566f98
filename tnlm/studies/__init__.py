"""Studies of a model: its structure, a space of designs, the rank of every matrix by trial."""
