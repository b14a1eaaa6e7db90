"""The child process that runs stages: jobs come in, events go out."""
