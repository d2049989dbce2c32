"""What Prometheus reads at /metrics.

Names that gateways and autoscalers look for are vLLM's, with its labels; those of pages, adapters and kernels are ours.
The engine's numbers are taken from its last heartbeat when someone asks, the front end's are counted as they come up.
Label values come from small fixed sets, or are the busiest few adapters.
"""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from flora.serve.frontend.client import EngineClient
from flora.serve.frontend.run import Run
from flora.serve.messages import Heartbeat, Ready, ResidentAdapter

MAX_ADAPTER_LABELS = 20  # the busiest; the others are summed up
OTHERS = "(others)"  # no adapter's name: a name has no parentheses
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of one front end, and its view of the engine."""

    def __init__(self, client: EngineClient, base_name: str, max_adapters: int) -> None:
        self._registry = CollectorRegistry()
        self._labels = {"model_name": base_name}
        names = list(self._labels)

        def counter(name: str, documentation: str, *more: str) -> Counter:
            return Counter(name, documentation, [*names, *more], registry=self._registry)

        def seconds(name: str, documentation: str) -> Histogram:
            return Histogram(name, documentation, names, registry=self._registry, buckets=_SECONDS)

        self._first_token = seconds(
            "vllm:time_to_first_token_seconds", "From a request's submission to its first token."
        )
        self._gap = seconds("vllm:inter_token_latency_seconds", "Between two tokens of one choice.")
        self._whole = seconds("vllm:e2e_request_latency_seconds", "From a request's submission to its last token.")
        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of finished requests.")
        self._generation_tokens = counter("vllm:generation_tokens", "Tokens sent as answers.")
        self._success = counter("vllm:request_success", "Requests that came to their end.", "finished_reason")
        self._responses = counter("flora:http_responses", "Answers by route and status.", "route", "status")
        self._registry.register(_EngineView(client, base_name, max_adapters))

    def note_run(self, run: Run) -> None:
        """A request is over."""
        timings, usage = run.timings, run.usage
        if timings.first_token_s is not None:
            self._first_token.labels(**self._labels).observe(timings.first_token_s)
        for gap_s in run.gaps_s:
            self._gap.labels(**self._labels).observe(gap_s)
        self._whole.labels(**self._labels).observe(timings.whole_s)
        self._prompt_tokens.labels(**self._labels).inc(usage.prompt_tokens)
        self._generation_tokens.labels(**self._labels).inc(usage.completion_tokens)
        for outcome in run.outcomes:
            self._success.labels(**self._labels, finished_reason=outcome).inc()

    def note_response(self, route: str, status: int) -> None:
        self._responses.labels(**self._labels, route=route, status=str(status)).inc()

    def render(self) -> bytes:
        """The text format."""
        return generate_latest(self._registry)


class _EngineView(Collector):
    """The last heartbeat as metrics."""

    def __init__(self, client: EngineClient, base_name: str, max_adapters: int) -> None:
        self._client = client
        self._base_name = base_name
        self._max_adapters = max_adapters

    def collect(self) -> Iterator[Metric]:
        yield self._gauge("flora:engine_up", "1 while the engine answers.", 0 if self._client.error else 1)
        yield self._gauge("flora:engine_silent_seconds", "Since the engine last spoke.", self._client.silent_s)
        yield self._total("flora:engine_heartbeats", "Heard from the engine.", self._client.num_heartbeats)
        ready, beat = self._client.ready, self._client.heartbeat
        if ready is not None:
            yield from self._constants(ready)
        if beat is not None:
            yield from self._load(beat)
            yield from self._adapters(beat)
            yield from self._totals(beat)

    def _constants(self, ready: Ready) -> Iterator[Metric]:
        config = InfoMetricFamily("vllm:cache_config", "Geometry of the page pool.", labels=["model_name"])
        config.add_metric(
            [self._base_name], {"block_size": str(ready.page_tokens), "num_gpu_blocks": str(ready.num_pages)}
        )
        yield config
        kernels = InfoMetricFamily("flora:kernel", "Which implementation runs.", labels=["op"])
        for op, implementation in ready.kernels.items():
            kernels.add_metric([op], {"implementation": implementation})
        yield kernels
        yield self._gauge("flora:page_bytes", "Bytes of one page.", ready.page_bytes)

    def _load(self, beat: Heartbeat) -> Iterator[Metric]:
        resident = {adapter.serving_digest for adapter in beat.resident}
        deferred = sum(count for digest, count in beat.waiting_by_adapter.items() if digest not in resident)
        yield self._gauge("vllm:num_requests_running", "Sequences that the engine works on.", beat.running)
        yield self._gauge("vllm:num_requests_waiting", "Sequences that wait.", beat.waiting)
        reasons = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "Deferred: their adapter is not resident.",
            labels=["model_name", "reason"],
        )
        reasons.add_metric([self._base_name, "deferred"], deferred)
        reasons.add_metric([self._base_name, "capacity"], max(beat.waiting - deferred, 0))
        yield reasons
        held = beat.kv_pages + beat.adapter_pages
        in_use = (held - beat.prefix_pages) / max(held + beat.free_pages, 1)
        yield self._gauge(
            "vllm:kv_cache_usage_perc",
            "Share of the pool's pages in use, 0 to 1; a prefix that is only kept is not.",
            in_use,
        )
        pages = GaugeMetricFamily("flora:pages", "Pages of the pool by use.", labels=["model_name", "use"])
        for use, count in (
            ("free", beat.free_pages),
            ("kv", beat.kv_pages - beat.prefix_pages),
            ("prefix", beat.prefix_pages),
            ("adapter", beat.adapter_pages),
        ):
            pages.add_metric([self._base_name, use], count)
        yield pages
        yield self._gauge("flora:host_cache_bytes", "Packed adapters in host memory.", beat.host_cache_bytes)

    def _adapters(self, beat: Heartbeat) -> Iterator[Metric]:
        busiest = sorted(beat.resident, key=lambda adapter: (-adapter.running, adapter.label))
        named, others = busiest[:MAX_ADAPTER_LABELS], busiest[MAX_ADAPTER_LABELS:]
        yield self._gauge("flora:resident_adapters", "Adapters in the pool.", len(beat.resident))
        running = GaugeMetricFamily(
            "flora:adapter_requests_running", "Sequences by adapter.", labels=["model_name", "adapter"]
        )
        for label, count in _by_label(named).items():
            running.add_metric([self._base_name, label], count)
        if others:
            running.add_metric([self._base_name, OTHERS], sum(adapter.running for adapter in others))
        yield running
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Unix time of this view of the adapters.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        waiting = [adapter.label for adapter in named if adapter.serving_digest in beat.waiting_by_adapter]
        names = [",".join(dict.fromkeys(labels)) for labels in ([adapter.label for adapter in named], waiting)]
        info.add_metric([str(self._max_adapters), *names], time.time())
        yield info

    def _totals(self, beat: Heartbeat) -> Iterator[Metric]:
        for name, documentation, total in (
            ("vllm:num_preemptions", "Sequences that gave their pages back to go on later.", beat.preemptions),
            ("vllm:prefix_cache_queries", "Prompt tokens looked for in the prefix cache.", beat.prefix_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found there.", beat.prefix_hits),
            ("flora:prefix_evictions", "Pages that the prefix cache gave back.", beat.prefix_evictions),
            ("flora:requests_aborted", "Refused: their first token would have come too late.", beat.aborts),
            ("flora:engine_steps", "Steps of the engine.", beat.steps),
            ("flora:engine_prompt_tokens", "Prompt tokens computed.", beat.prompt_tokens),
            ("flora:engine_generated_tokens", "Tokens drawn.", beat.generated_tokens),
            ("flora:adapter_loads", "Adapters read and packed.", beat.adapter_loads),
            ("flora:adapter_load_seconds", "Time that took.", beat.adapter_load_seconds),
            ("flora:adapter_evictions", "Adapters that gave their pages back.", beat.adapter_evictions),
        ):
            yield self._total(name, documentation, total)

    def _total(self, name: str, documentation: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(name, documentation, labels=["model_name"])
        family.add_metric([self._base_name], value)
        return family

    def _gauge(self, name: str, documentation: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, documentation, labels=["model_name"])
        family.add_metric([self._base_name], value)
        return family


def _by_label(adapters: list[ResidentAdapter]) -> dict[str, int]:
    """Two versions may have been asked for under one name."""
    counts: dict[str, int] = {}
    for adapter in adapters:
        counts[adapter.label] = counts.get(adapter.label, 0) + adapter.running
    return counts
