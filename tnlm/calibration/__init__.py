"""Data, statistics, and the metrics made from them."""
