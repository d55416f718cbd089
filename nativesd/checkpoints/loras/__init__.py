"""What people do with LoRAs: merge them into a checkpoint, extract, resize and join them, and give them other names."""
