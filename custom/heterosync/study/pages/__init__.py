"""What a reader opens: text, page and figures of runs and of studies."""
