"""Tensor networks as einsum equations: contraction, gauge and cost; independent of models."""
