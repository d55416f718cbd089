"""The APIs, a file each: from what a client sends to jobs, and from these to what it reads."""
