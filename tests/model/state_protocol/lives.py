"""How long things live, in seconds: the server's defaults."""

MINUTE = 60.0
HOUR = 60 * MINUTE
DAY = 24 * HOUR

TAPE = 15 * MINUTE
COUNTED_NAME = 2 * TAPE
"""A counted contribution's name, and a request id, from the step on."""
CONTRIBUTION = DAY
MARKER_EXTRA = DAY
"""How much longer than its session a marker lives, at least."""
SESSION_TTLS = (HOUR, 7 * DAY)
VERSIONS_KEPT = 4
"""Superseded versions that are kept however old they are."""
REPLAY_WINDOW = 4
LONGEST_PAUSE = 10 * MINUTE
"""No call pauses longer inside a replica: see docs/protocol.md."""


def marker(ttl: float) -> float:
    """Return how long the marker of a session outlives its last operation.

    A quarter of the ttl may pass before an operation extends it again.
    """
    return 1.25 * ttl + MARKER_EXTRA
