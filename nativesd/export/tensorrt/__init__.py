"""TensorRT and TensorRT-RTX: engines built from ONNX graphs, loaded onto a GPU and run."""
