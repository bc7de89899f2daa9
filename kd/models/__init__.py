"""Student and teacher factories: ``f(..., *, num_classes, input_shape) -> nn.Module``."""
