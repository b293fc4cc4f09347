"""Startup kits: the alliance's project file, provisioning, the seal, a site's policy, and the check at the hospital."""
