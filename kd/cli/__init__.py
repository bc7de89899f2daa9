"""What is typed: one module a verb. Imports nothing heavy."""
