"""Distillation losses: one file a method, the pure function on top, its Term below. Imports torch alone."""
