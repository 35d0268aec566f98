"""From a request to a compressed model."""
