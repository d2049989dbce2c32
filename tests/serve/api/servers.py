"""A real server in a process of its own, over a small base with a tokenizer and a registry of adapters of it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flora.adapter import Adapter, make_adapter
from flora.checkpoint import open_checkpoint
from flora.identity import base_record
from flora.registry import Registry, Version
from flora.serve import EngineConfig, ServeConfig
from flora.serve.engine.model.config import parse_model_config
from tests.serve.api.serve_main import encode
from tests.serve.engine.adapters import random_adapter
from tests.serve.frontend.vocabularies import byte_level_spec

BASE = "tiny-base"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATIENCE_S = 60.0  # for what happens in another process
_READY = re.compile(r"serving at (http://\S+)")


@dataclass
class World:
    """What a server serves."""

    base: Path
    home: Path

    @property
    def registry(self) -> Registry:
        return Registry.open(self.home / "registry")

    def adapter(self, seed: int, **options: Any) -> Adapter:
        checkpoint = open_checkpoint(self.base)
        base_id = options.pop("base_id", str(base_record(checkpoint, self.home / "cache").base_id))
        defaults: dict[str, Any] = {"ranks": range(1, 9), "gain": 6.0, "base_id": base_id}
        return random_adapter(parse_model_config(checkpoint.config), seed, **defaults | options)

    def add(self, adapter: Adapter, name: str, **options: Any) -> Version:
        with self.registry as registry:
            return registry.add(adapter, name, **options)

    def blobs(self) -> list[Path]:
        return [path for path in (self.home / "registry" / "blobs").rglob("*") if path.is_file()]

    def config(self, *, engine: dict[str, Any] | None = None, **settings: Any) -> ServeConfig:
        defaults: dict[str, Any] = {
            "base": self.base,
            "registry": str(self.home / "registry"),
            "cache_dir": self.home / "cache",
            "pool_bytes": 8 << 20,
            "max_batch_tokens": 64,
            "num_threads": 1,
            "poison": True,
        }
        return ServeConfig(
            engine=EngineConfig(
                **defaults | (engine or {}),
            ),
            **{"base_name": BASE, "port": 0} | settings,
        )


def with_extras(adapter: Adapter, extras: dict[str, bytes]) -> Adapter:
    """The same factors from a tuned checkpoint that had these files."""
    return make_adapter(adapter.factors, adapter.header.base, adapter.header.recipe, extras=extras)


def make_world(folder: Path) -> World:
    """A base of two layers, its tokenizer and chat template, and a registry with nothing in it yet."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=321,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [2]
    model.save_pretrained(folder / "base")
    (folder / "base" / "tokenizer.json").write_text(json.dumps(byte_level_spec()))
    (folder / "base" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": CHATML})
    )
    return World(folder / "base", folder / "home")


@dataclass
class Server:
    url: str
    process: subprocess.Popen[str]
    log: list[str]
    http: httpx2.Client

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | options)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return self.http.get(f"{self.url}{path}", **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        return self.http.post(f"{self.url}{path}", json=body, **options)

    def metric(self, name: str, **labels: str) -> float:
        """A value of /metrics."""
        for line in self.get("/metrics").text.splitlines():
            if line.startswith((f"{name}{{", f"{name} ")) and all(f'{k}="{v}"' in line for k, v in labels.items()):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no metric {name} {labels}")

    def aborts(self) -> float:
        """Sequences that nobody wanted any more; a metric only from the first one on."""
        found = re.findall(r'^vllm:request_success_total\{.*"abort".*\} (\S+)$', self.get("/metrics").text, re.M)
        return sum(map(float, found))

    def settle(self) -> None:
        """Returns once the metrics tell of everything that the engine did until now."""
        heard = self.metric("flora:engine_heartbeats_total")
        eventually(lambda: self.metric("flora:engine_heartbeats_total") >= heard + 2)

    @property
    def engine_pid(self) -> int:
        [pid] = [int(found[1]) for line in self.log if (found := re.search(r"engine ready pid=(\d+)", line))]
        return pid

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def eventually(holds: Callable[[], bool]) -> None:
    """Returns once it holds, in a process that this one can only look at."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s"
        time.sleep(0.02)


@contextmanager
def running(config: ServeConfig, env: dict[str, str] | None = None) -> Iterator[Server]:
    """A server that is ready; killed at the end if the test has not stopped it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serve.api.serve_main"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
    )
    assert process.stdin is not None
    process.stdin.write(encode(config))
    process.stdin.close()
    log: list[str] = []
    try:
        url = _read_until_ready(process, log)
        threading.Thread(target=_keep_reading, args=(process, log), daemon=True).start()
        with httpx2.Client(timeout=PATIENCE_S) as http:
            yield Server(url, process, log, http)
    except BaseException:
        sys.stderr.write("".join(log[-60:]))
        raise
    finally:
        process.kill()
        process.wait()


def _read_until_ready(process: subprocess.Popen[str], log: list[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        log.append(line)
        if match := _READY.search(line):
            return match[1]
    raise AssertionError(f"the server ended with code {process.wait()}")


def _keep_reading(process: subprocess.Popen[str], log: list[str]) -> None:
    assert process.stderr is not None
    log.extend(process.stderr)
