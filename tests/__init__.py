"""Tests. What they share: this file and `tiny`."""

# Seconds after which a subprocess or a wait counts as hung. Far above what any of them needs on a slow, busy machine:
# no test measures speed.
HANGS_AFTER_S = 1800
