"""Shares work out: to ranks of torch.distributed, or to an executor."""
