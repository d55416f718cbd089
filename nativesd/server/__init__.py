"""Pictures over HTTP: the APIs that today's clients talk to, over one queue of jobs."""
