"""Methods that read hidden states (B, L, D) of transformers, or queries, keys and values, with a padding mask."""
