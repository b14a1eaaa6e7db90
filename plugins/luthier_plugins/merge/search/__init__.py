"""Weights and parameters of a merge, found on a validation set."""
