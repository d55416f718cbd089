"""From a prompt to latents and pictures: a call, its passes, and what steers them."""
