"""Loads, saves, tokenizes, renders, generates with and compares models. The rooms with torch build on it."""
