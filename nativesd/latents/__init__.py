"""Between latents and pictures: the VAE, whole or strip by strip, and what is seen of a sampler at work."""
