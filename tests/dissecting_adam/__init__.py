"""Balles & Hennig: every algorithm box followed step by step, the options, the paper's claims."""
