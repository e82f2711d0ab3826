"""From a component to a checked ONNX graph."""
