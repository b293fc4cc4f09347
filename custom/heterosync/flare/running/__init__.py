"""Who runs a job: FLARE's simulator, POC mode, an admin's session, a chain of jobs; and the record brought back."""
