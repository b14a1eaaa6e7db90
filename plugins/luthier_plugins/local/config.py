"""The config of the local executor."""

from luthier.api import Config


class LocalConfig(Config):
    """Nothing to choose: one worker process, which uses what the machine has."""
