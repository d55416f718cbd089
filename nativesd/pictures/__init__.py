"""What comes in and goes out: pictures, masks, hints, and the parameters that a picture carries."""
