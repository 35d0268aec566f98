"""One self-contained HTML page about a compressed model."""
