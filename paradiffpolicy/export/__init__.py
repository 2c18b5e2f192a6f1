"""Plans as files that run without this package: OpenVINO, ONNX and PyTorch programs."""
