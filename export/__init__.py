"""From a checkpoint to a bundle: ONNX graphs and the manifest."""
