"""Mixture of experts out of dense models."""
