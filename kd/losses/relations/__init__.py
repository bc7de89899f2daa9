"""Methods that read relations between the samples of a batch or of the training set."""
