"""The Flax harness: tunes, replicates and compares optimizers (extra ``experiments``).

It knows the optimizers only through `optgrad.registry`.
"""
