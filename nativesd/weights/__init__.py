"""Names, shapes and files: published checkpoints into modules and back."""
