"""Jobs: what waits, what runs, what came of it, and the models that they run on. Nothing here knows of HTTP."""
