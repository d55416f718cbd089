"""Frames in, frames out: the real-time stream, several frames at several noise levels in one call of the networks."""
