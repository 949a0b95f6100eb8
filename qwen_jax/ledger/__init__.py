"""What a worker leaves: names, metadata, checkpoint, progress record. The standard library alone reads it."""
