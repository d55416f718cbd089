"""What people do with files: audit, compare, convert, merge, make LoRAs of them, export."""
