"""Reading checkpoints: files of a stranger, checked before and after they become a model."""
