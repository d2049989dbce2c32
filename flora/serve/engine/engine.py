"""The engine: a plain object with `step()`. Requests go in, messages come out; a process is a shell around it.

    submit ─► waiting ─► plan ─► write adapters ─► forward and sample ─► commit ─► messages
                 └─► loader (beside the loop) ─► host cache ─┘

Decisions are the scheduler's (integers), the device is the runner's; this file carries values between them.
"""

import logging
import time
from collections.abc import Callable

from flora.errors import EngineDead, FloraError, Overloaded, RequestInvalid
from flora.serve.engine.answers import Answers
from flora.serve.engine.loading.host_cache import HostCache
from flora.serve.engine.loading.loader import Loader
from flora.serve.engine.outbox import Outbox, Outgoing
from flora.serve.engine.refusals import check_adapter, check_prompt, too_late
from flora.serve.engine.runner import LaunchedStep, Runner
from flora.serve.engine.schedule.pages import PagePool, Use
from flora.serve.engine.schedule.policy import Policy
from flora.serve.engine.schedule.scheduler import Limits, Plan, Scheduler
from flora.serve.engine.schedule.sequence import Key, Sequence, State
from flora.serve.engine.supply import AdapterSupply
from flora.serve.messages import (
    Cancel,
    Heartbeat,
    LoadAdapter,
    Ready,
    ResidentAdapter,
    Submit,
    UnloadAdapter,
)

logger = logging.getLogger(__name__)


class Engine:
    """Serves requests for one base and any adapters of it. One thread owns it."""

    def __init__(
        self,
        ready: Ready,
        runner: Runner,
        pages: PagePool,
        limits: Limits,
        policy: Policy,
        loader: Loader,
        *,
        num_slots: int,
        slot_pages: int | None = None,
        host_cache_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """build.build_engine makes one from an EngineConfig."""
        self.ready = ready
        self.pages = pages
        self.runner = runner
        self.host = HostCache(host_cache_bytes, runner.settle)
        self.scheduler = Scheduler(limits, policy, pages, num_slots, self.host.num_pages, slot_pages)
        self.residency = self.scheduler.residency
        self._outbox = Outbox()
        self._answers = Answers(self.scheduler, self._outbox)
        self.supply = AdapterSupply(self.scheduler, pages, self.host, loader, runner, self._outbox, clock)
        self.loader = loader
        self._clock = clock
        self._arrivals = 0
        self.is_draining = False
        self.is_stalled = False  # the last step had no rows and told nothing: only a message or a load changes that
        self._launched: LaunchedStep | None = None  # the step whose tokens are still to be collected
        self._steps = 0
        self._prompt_tokens = 0
        self._aborts = 0

    # --- what front ends ask ---

    def submit(self, message: Submit, client: bytes = b"") -> None:
        """Queues a request; one that cannot be served is answered by Rejected."""
        key = (client, message.request_id)
        try:
            self._submit(message, key)
        except FloraError as error:
            self._outbox.reject(key, error)

    def cancel(self, message: Cancel, client: bytes = b"") -> None:
        """Ends a request in whatever phase it is. One that is not here has ended already."""
        sequence = self.scheduler.get((client, message.request_id))
        if sequence:
            self._answers.end(sequence, "cancelled")

    def load_adapter(self, message: LoadAdapter, client: bytes = b"") -> None:
        """Makes an adapter resident as soon as there is room; answered by AdapterLoaded or Rejected."""
        try:
            check_adapter(message.adapter, self.ready)
            self.supply.load(message, client)
        except FloraError as error:
            self._outbox.reject((client, message.request_id), error)

    def unload_adapter(self, message: UnloadAdapter, client: bytes = b"") -> None:
        """Lets an adapter go as soon as no running sequence needs it; answered at once by AdapterUnloaded."""
        self.supply.unload(message, client)

    def abandon(self, client: bytes) -> None:
        """Ends every request of a front end that is gone."""
        for sequence in self.scheduler.of_client(client):
            self._answers.end(sequence, "cancelled")

    def refuse(self, client: bytes, request_id: str | None, error: FloraError) -> None:
        """Ends one request, wherever it is, with this error."""
        if request_id is None:
            return
        sequence = self.scheduler.get((client, request_id))
        if sequence:
            self._answers.refuse(sequence, error)
        else:
            self._outbox.reject((client, request_id), error)

    def drain(self) -> None:
        """From now on new requests are refused; the others run to their end."""
        self.is_draining = True

    def forget(self) -> None:
        """Lets every adapter go, on the device and in host memory. Only for an engine that is idle."""
        assert self.is_idle
        for resident in list(self.residency):
            self.residency.retire(resident.digest)
        self.supply.sync()
        self.host.free(self.host.num_bytes, lambda digest: False)

    def close(self) -> None:
        self.loader.close()

    # --- the loop ---

    @property
    def is_idle(self) -> bool:
        """Nothing to compute, to load or to tell."""
        return self.scheduler.is_empty and self.supply.is_idle and self._outbox.is_empty and self._launched is None

    def step(self, wait_s: float = 0.0) -> list[Outgoing]:
        """Plan, launch and collect; what there is to tell, each message with the identity of its front end.

        Where the runner overlaps, the tokens collected are those of the step before: this one runs on the device while
        they are told and the next is planned. A sequence that turns out to have ended has then one row too many under
        way, which is thrown away.

        wait_s  how long to wait for a load if there is nothing else to do
        """
        self._receive(0.0)
        now_s = self._clock()
        self._abort_late(now_s)
        self.supply.fill_orders()
        self.supply.start_loads()
        plan = self.scheduler.plan(now_s)
        launched = self._launch(plan)
        if self.runner.overlaps:
            launched, self._launched = self._launched, launched
        if launched:
            self._collect(launched)
        self.is_stalled = not plan.chunks and self._outbox.is_empty and self._launched is None
        if self.is_stalled and wait_s:
            self._receive(wait_s)
        return self._outbox.take()

    def heartbeat(self) -> Heartbeat:
        """The engine's state, in numbers."""
        scheduler = self.scheduler
        return Heartbeat(
            running=len(scheduler.running),
            waiting=scheduler.num_waiting,
            waiting_by_adapter=scheduler.waiting_by_adapter(),
            free_pages=self.pages.num_free,
            kv_pages=self.pages.count(Use.KV),
            adapter_pages=self.pages.count(Use.ADAPTER),
            prefix_pages=scheduler.prefixes.idle_pages,
            resident=tuple(
                ResidentAdapter(
                    serving_digest=resident.digest,
                    label=resident.label,
                    num_pages=len(resident.pages),
                    rank=resident.rank,
                    running=resident.running,
                    pinned=resident.pinned,
                )
                for resident in self.residency
            ),
            host_cache_bytes=self.host.num_bytes,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._answers.num_generated,
            preemptions=scheduler.num_preemptions,
            adapter_loads=self.supply.num_loads,
            adapter_load_seconds=self.supply.load_s,
            adapter_evictions=self.residency.num_evictions,
            prefix_queries=scheduler.num_prompt_tokens,
            prefix_hits=scheduler.num_cached_tokens,
            prefix_evictions=scheduler.prefixes.num_evictions,
            aborts=self._aborts,
        )

    # --- requests in the loop ---

    def _receive(self, wait_s: float) -> None:
        """Takes what the loader finished; waiting sequences that can never run are refused."""
        for sequence, error in self.supply.receive(wait_s):
            self._answers.refuse(sequence, error)

    def _abort_late(self, now_s: float) -> None:
        """Refuses who waits and can no longer have a first token in time, so that others can."""
        for sequence in self.scheduler.late(now_s):
            self._aborts += 1
            slo_s, num_waiting = self.scheduler.policy.slo_ttft_s, self.scheduler.num_waiting
            assert slo_s is not None, "without a bound nobody is late"
            self._answers.refuse(sequence, too_late(slo_s, now_s - sequence.arrived_s, num_waiting))

    def _submit(self, message: Submit, key: Key) -> None:
        if self.is_draining:
            raise Overloaded("the server is shutting down", fix="send the request to another server")
        if self.scheduler.get(key):
            raise RequestInvalid(f"request {message.request_id} is here already")
        check_prompt(message.prompt, self.ready)
        check_adapter(message.adapter, self.ready)
        sequence = Sequence(
            key,
            message.prompt,
            message.sampling,
            message.adapter,
            order=self._arrivals,
            arrived_s=self._clock(),
            max_context=self.ready.max_context,
        )
        self.scheduler.submit(sequence)
        self._arrivals += 1

    # --- one step ---

    def _launch(self, plan: Plan) -> LaunchedStep | None:
        """Brings the device to the planned state and starts the rows. A failure ends the plan's requests, no others."""
        try:
            self.supply.write(plan.placed)
            if not plan.chunks:
                return None
            launched = self.runner.launch(plan.chunks, [chunk.sequence.slot for chunk in plan.chunks])
        except EngineDead:
            raise
        except Exception as error:
            logger.exception("step failed requests=%d", len(plan.chunks))
            for chunk in plan.chunks:
                self._answers.end(chunk.sequence, "error", error=f"the engine failed in this request's step: {error!r}")
            return None
        self._steps += 1
        self._prompt_tokens += sum(
            chunk.num_prompt_tokens for chunk in plan.chunks if chunk.start < chunk.sequence.num_prompt
        )
        self.scheduler.commit(plan)
        return launched

    def _collect(self, launched: LaunchedStep) -> None:
        """Tells a step's tokens. Sequences that ended since it was launched get none of them."""
        for chunk, drawn in launched.collect():
            if chunk.sequence.state is not State.FINISHED:
                self._answers.advance(chunk, drawn)
