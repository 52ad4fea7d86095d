"""The gRPC face: decode, check, call the domain, encode. No rule of the domain stands here.

| module | what it does |
| --- | --- |
| `server` | options, services, health and reflection; starts and drains |
| `gate` | the one place every call passes: who calls, is there room, how long, what went wrong |
| `auth`, `admission`, `wire`, `errors` | what the gate asks |
| `model_service`, `session_service`, `time_rnn_service`, `health`, `reflection` | the services |
| `stream`, `lanes`, `histories`, `operations` | one stream: its ends, its order, its tokens, its calls |
| `*_messages`, `tensors`, `fields` | converters between messages and the domain's values |
"""
