"""Set-ups: methods that own the training loop."""
