"""Methods for language models: sparse teachers over a large vocabulary, two tokenizers, sampled text."""
