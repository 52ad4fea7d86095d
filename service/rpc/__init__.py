"""The gRPC face: decode, check, call the domain, encode. No rule of the domain stands here.

| module | what it does |
| --- | --- |
| `server` | options, services, health and reflection; starts and drains |
| `gate` | the one place every call passes: who calls, is there room, how long, what went wrong |
| `auth`, `admission`, `errors` | the three things the gate asks |
| `model_service`, `session_service`, `time_rnn_service`, `stream`, `health` | the services |
| `*_messages`, `tensors`, `fields` | converters between messages and the domain's values |
"""
