"""Job folders: what stands in them, who writes them, which classes they may name."""
