"""Trains models: batches, the trainer, and the mathematics that objectives share."""
