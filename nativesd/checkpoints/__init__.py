"""What people do with files: audit, compare, convert, merge a LoRA, export."""
