"""Files of weights of every kind: what their headers say of the tensors in them, read without executing anything."""
