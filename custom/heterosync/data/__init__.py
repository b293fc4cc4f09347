"""Site folders: what a hospital prepares, how it is checked, split, decoded once and handed to the training loop."""
