"""Several processes for one run. Nothing of distillation inside."""
