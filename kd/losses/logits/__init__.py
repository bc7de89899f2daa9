"""Methods that read the logits: rows × classes."""
