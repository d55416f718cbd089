"""What this machine has, what will not work on it, whether it computes right, and how fast."""
