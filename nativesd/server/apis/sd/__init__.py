"""A1111's API: what its clients send, and what they read."""
