"""What a study shows: runs read back, metrics, intervals and tests, and the tables of them."""
