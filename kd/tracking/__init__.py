"""Loggers: ``metrics.csv``, TensorBoard, MLflow, Weights & Biases."""
