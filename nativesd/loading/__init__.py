"""From a source to a pipeline: located, identified, chosen from, built, filled, settled."""
