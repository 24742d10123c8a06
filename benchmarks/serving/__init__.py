"""Tokens a second with many adapters in one batch: our engine, method by method, and peft's batches of ``adapter_names``.

`methods` says what is compared and writes its adapters, `served` runs a batch of requests through an engine or through `generate`,
`timing` checks answers and takes times, `table` shows them.
"""
