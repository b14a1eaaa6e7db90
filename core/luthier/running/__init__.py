"""Runs a plan: store, locks, manifests, runner, worker, events.

It imports nothing: a worker that starts does not pay for planning.
"""
