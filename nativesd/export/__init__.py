"""Modules as ONNX graphs and TensorRT engines."""
