"""Adapters from adapters, and adapters from models."""
