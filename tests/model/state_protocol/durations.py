"""Times to live and other durations in seconds: the server's defaults."""

MINUTE = 60.0
HOUR = 60 * MINUTE
DAY = 24 * HOUR

TAPE = 15 * MINUTE
RECORDED_NAME = 2 * TAPE
"""How long a recorded contribution's name and a request id are remembered after the step."""
CONTRIBUTION = DAY
MARKER_EXTRA = DAY
"""The least time by which a marker outlives its session."""
SESSION_TTLS = (HOUR, 7 * DAY)
VERSIONS_KEPT = 4
"""Superseded versions that are kept however old they are."""
REPLAY_WINDOW = 4
LONGEST_PAUSE = 10 * MINUTE
"""No call pauses longer than this inside a replica: see docs/protocol.md."""


def marker(ttl: float) -> float:
    """Return how long the marker of a session outlives its last operation.

    A quarter of the ttl may pass before an operation extends it again.
    """
    return 1.25 * ttl + MARKER_EXTRA
