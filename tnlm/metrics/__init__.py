"""How the error of a matrix is measured."""
