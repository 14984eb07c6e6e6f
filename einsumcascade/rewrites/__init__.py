"""Rewrites of cascades, one file each, with its precondition beside it, and the derivations made of them."""
