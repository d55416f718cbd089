"""Guidance: how a model is asked more than once, and how its answers become one."""
