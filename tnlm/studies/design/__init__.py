"""The design space of a model: which layers and matrices, at which rank, and what it costs."""
