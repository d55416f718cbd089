"""The stream over a WebSocket, in the protocol of StreamDiffusion's webcam demo."""
