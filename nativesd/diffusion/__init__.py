"""One pass: from prompts and noise to latents and pixels, and what steers it on the way."""
