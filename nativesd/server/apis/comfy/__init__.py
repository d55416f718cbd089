"""ComfyUI's API: graphs of the nodes that most workflows are made of, its queue, history, files and WebSocket."""
