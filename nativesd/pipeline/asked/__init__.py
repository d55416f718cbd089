"""What a call is asked for: options read, in their ranges, held against the model, and repeated from pictures."""
