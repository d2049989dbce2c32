"""HTTP: OpenAI's routes as one ASGI application.

app.py         the layers that a request passes, and how errors become answers
traffic.py, access.py, bodies.py, protocol.py   ids and counts; hosts and keys; sizes and times; deadlines of a socket
schema.py      bodies of requests, bounded;  ignored.py  what they hold that nobody knows
generate.py, adapters.py, operations.py   the routes
shapes.py, sse.py, disconnect.py          answers, streams of them, and clients that leave
errors.py      the one table from error to status;  metrics.py  what Prometheus reads;  state.py  what routes share
"""
