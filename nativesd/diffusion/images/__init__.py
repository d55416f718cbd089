"""Pictures as prompts: from what a call names to the keys and values that the UNet's attentions add."""
