"""Looks at a model before it is compressed: spectra of weights and features, error curves."""
