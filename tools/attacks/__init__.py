"""Hostile inputs of every kind, made from a seed: what tools/attack.py tries, and what tests share."""
