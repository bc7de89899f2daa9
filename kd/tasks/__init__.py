"""Tasks: what is a row, a target, a metric."""
