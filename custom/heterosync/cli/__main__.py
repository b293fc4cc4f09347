"""`python -m heterosync.cli`, the same as `heterosync`."""

from heterosync.cli import main

raise SystemExit(main())
