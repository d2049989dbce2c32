"""What the engine has to tell, gathered over a step: one StepEvents frame for each front end."""

from flora.errors import FloraError
from flora.serve.engine.schedule.sequence import Key
from flora.serve.messages import FromEngine, Rejected, StepEvents, TokenEvent

Outgoing = tuple[bytes, FromEngine]  # a front end's identity, and what it is told


class Outbox:
    """Messages in the order they came up, then each front end's token events."""

    def __init__(self) -> None:
        self._messages: list[Outgoing] = []
        self._events: dict[bytes, list[TokenEvent]] = {}

    @property
    def is_empty(self) -> bool:
        return not self._messages and not self._events

    def send(self, client: bytes, message: FromEngine) -> None:
        self._messages.append((client, message))

    def reject(self, key: Key, error: FloraError) -> None:
        client, request_id = key
        rejected = Rejected(
            request_id=request_id, code=error.code, message=error.what, cause=error.cause, fix=error.fix
        )
        self.send(client, rejected)

    def tell(self, client: bytes, event: TokenEvent) -> None:
        events = self._events.get(client)
        if events is None:
            events = self._events[client] = []
        events.append(event)

    def take(self) -> list[Outgoing]:
        messages, self._messages = self._messages, []
        events, self._events = self._events, {}
        return messages + [(client, StepEvents(events=tuple(found))) for client, found in events.items()]
