"""How a budget is shared out between matrices."""
