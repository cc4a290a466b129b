"""Processes and devices: joining, sharding, agreement, and the watch over them."""
