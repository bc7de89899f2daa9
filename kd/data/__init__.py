"""What a run needs of any data: batches, splits, facts that travel with weights."""
