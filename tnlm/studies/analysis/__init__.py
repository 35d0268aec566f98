"""The structure of a model: spectra, groups of singular values, intrinsic dimension."""
