"""Finds plugins and their components."""

from luthier.registry.registry import BrokenPlugin, Provider, Registry, default_registry

__all__ = ["BrokenPlugin", "Provider", "Registry", "default_registry"]
