"""What runs inside a rank: the training loop, models, datasets and checkpoints. Started by module name only."""
