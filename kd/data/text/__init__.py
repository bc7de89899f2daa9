"""Text as batches of token ids: sentences with classes, documents for language models, prompts with completions."""
