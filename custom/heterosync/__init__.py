"""heterosync: HeteroSync Learning and federated prostate segmentation as NVIDIA FLARE jobs."""

__version__ = "0.1.0"
