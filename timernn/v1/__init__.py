"""The contract as generated from proto/timernn/v1: messages, stubs and servicers."""
