"""The only room that imports nvflare.

Here: the components that a job's configuration names, and what they stand on. In jobs/: job folders. In kits/:
startup kits. In running/: what starts and follows a job.
"""
