"""The logic of the client, free of I/O: generators that yield what is to be done.

A method of the core is a generator (an `Op`). It yields effects (`RpcCall`, `Sleep`, …), receives their
outcome, and returns the answer. `timernn._sync` and `timernn.aio` each drive these generators over
their kind of channel and add nothing else, so numbering, retries and healing exist once.
"""
