"""Scripts that run a peer in an environment of its own, and the ruler that both sides are measured with."""
