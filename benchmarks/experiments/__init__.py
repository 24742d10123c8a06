"""Fine-tuning runs as experiments: recipes in, one JSON a run out. Tables and plots are made from those files alone."""
