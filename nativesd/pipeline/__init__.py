"""A call: what it may ask for, its passes put together, and the pictures with their text."""
