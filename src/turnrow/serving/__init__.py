"""Serve one model with any number of adapters to many clients at once, each request as if it were served alone."""
