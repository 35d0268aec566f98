"""Networks of factors as einsum equations: their algebra, gauge and cost; knows no model."""
