"""What a checkpoint is, by its names and shapes and by what it says of itself: components, configurations, evidence."""
