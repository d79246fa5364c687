"""What computes on keys and values that lie in a store; owns no memory of its own."""
