"""Mixture of experts from dense models."""
