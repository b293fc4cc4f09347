"""What is done with finished or running trainings: tables, figures, reports, predictions, exports, demo and doctor.

A report reads the files of the results contract (run.json, history.csv, cross_site_metrics.json) and nothing else.
"""
