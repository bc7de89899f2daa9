"""Image sets, the split of each, augmentation on whole batches."""
