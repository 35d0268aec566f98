"""Metrics: how the error of a matrix is measured."""
