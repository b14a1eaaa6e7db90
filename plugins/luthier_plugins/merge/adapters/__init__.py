"""Adapters out of adapters, and adapters out of models."""
