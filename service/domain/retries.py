"""How often an optimistic operation is tried again after another writer was faster.

Each try reads what is there and acts only if it still is. A try fails only because another writer's has
succeeded, so all of them together always make progress; the counts bound how long one caller may be
unlucky. After that the caller is refused with UNKNOWN_OUTCOME and may send the same request again.
"""

from __future__ import annotations

from typing import Final

# A session has one writer that is not fenced off, and its chunks pass this replica in order. Its rivals are late copies of
# the same chunks on other replicas, of which there are few.
CHUNK_TRIES: Final = 6
# A new epoch fences off the writers of the old one: its rivals are other resets of the session.
EPOCH_TRIES: Final = 5
# A read of weights loses the race if the version is superseded, and its moments are gone, while it is read. Training can
# publish one version after another for as long as it goes on.
READ_TRIES: Final = 8
# Steps of one model take turns within a replica, so the rivals are one step of each other replica.
STEP_TRIES: Final = 16
