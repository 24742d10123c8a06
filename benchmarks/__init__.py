"""Experiments in, ``results/*.json`` out, tables made from them. Run from the repository's root; not part of the wheel."""
