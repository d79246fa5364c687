"""Where keys and values lie. Memory and nothing else: what computes on them is a runner."""
