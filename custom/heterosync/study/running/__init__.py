"""How a study is run: plan, data, one process per run, record and progress."""
