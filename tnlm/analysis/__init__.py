"""What can be learned about a model, and about a task, before or beside compressing it."""
