"""What will be done to each matrix, and what was achieved."""
