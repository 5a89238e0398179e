"""How much of everything so many requests need, by a queueing model with measured costs; docs/capacity.md."""
