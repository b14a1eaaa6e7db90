"""The streaming merge engine. Authors of merge methods import `luthier.merging.api`."""
