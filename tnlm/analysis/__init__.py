"""The structure of a model: spectra, groups of singular values, its intrinsic dimension."""
