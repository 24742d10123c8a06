"""Looking inside: what fine-tuning can reach before training, and what it changed."""
