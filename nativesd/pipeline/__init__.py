"""From a source to a pipeline, and from a prompt to latents and pictures."""
