"""Chunks that were computed once, kept in memory and on a disk, to be put into any prompt that holds them."""
