"""What LoRA files say, and how they enter the weights."""
