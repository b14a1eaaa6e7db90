"""The one place in core that knows torch: model and tokenizer IO, and the training loop's glue."""
