"""Methods that read intermediate feature maps or vectors."""
