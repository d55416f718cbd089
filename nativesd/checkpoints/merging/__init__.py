"""Checkpoints merged: by which method, how much of which block, and the recipe that says all of it."""
