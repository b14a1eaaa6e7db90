"""Servers for trying models out, what serving programs need, and tools with environments of their own."""
