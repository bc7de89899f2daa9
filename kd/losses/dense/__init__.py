"""Methods for maps whose every position counts: segmentation, detection."""
