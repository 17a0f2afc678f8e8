"""The nodes that evaluate, and what they share."""
