"""Whole checkpoints from one layout to another: streamed, resumable, complete or refused."""
