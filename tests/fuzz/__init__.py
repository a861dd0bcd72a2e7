"""Bytes from outside, mutated for as long as one likes: what reads them gives a right answer or the error named."""
