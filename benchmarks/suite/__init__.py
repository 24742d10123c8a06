"""Suites of real fine-tunings: experiments in (``benchmarks/experiments/*.yaml``), one JSON file a run out, tables and plots from those."""
