"""optimize: model components become ONNX and TensorRT artifacts that are proved right."""
__version__ = "0.1.0"
