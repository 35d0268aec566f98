"""What is compressed: one file a kind of target."""
