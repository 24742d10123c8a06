"""A load on `turnrow serve`: thousands of adapters, many clients; nothing may be lost, nothing wrong, and memory stays bounded.

`adapters` writes the adapters, `asking` draws requests and sends them, `server` runs the server and watches it, `answers` holds what came
against the merged models, `report` sums up and draws.
"""
