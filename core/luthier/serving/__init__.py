"""Servers for trying models out, what serving programs need, and tools with their own environments."""
