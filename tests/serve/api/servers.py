"""A real server in a process of its own, over a small base with a tokenizer and a registry of adapters of it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import openai
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flora.adapter import Adapter
from flora.checkpoint import open_checkpoint
from flora.identity import base_record
from flora.registry import Registry, Version
from flora.serve import EngineConfig, ServeConfig, serve
from flora.serve.config import encode_engine_config
from flora.serve.engine.model.config import parse_model_config
from tests.serve.engine.adapters import random_adapter
from tests.serve.frontend.vocabularies import byte_level_spec

BASE = "tiny-base"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
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
        return random_adapter(parse_model_config(checkpoint.config), seed, ranks=range(1, 9), base_id=base_id, **options)

    def add(self, adapter: Adapter, name: str, **options: Any) -> Version:
        with self.registry as registry:
            return registry.add(adapter, name, **options)

    def config(self, *, engine: dict[str, Any] | None = None, **settings: Any) -> ServeConfig:
        defaults: dict[str, Any] = {"pool_bytes": 8 << 20, "max_batch_tokens": 64, "num_threads": 1, "poison": True}
        return ServeConfig(
            engine=EngineConfig(
                base=self.base,
                registry=str(self.home / "registry"),
                cache_dir=self.home / "cache",
                **defaults | (engine or {}),
            ),
            **{"base_name": BASE, "port": 0} | settings,
        )


def make_world(folder: Path) -> World:
    """A base of two layers, its tokenizer and chat template, and a registry with nothing in it yet."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=352,
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

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | options)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return httpx2.get(f"{self.url}{path}", **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        return httpx2.post(f"{self.url}{path}", json=body, timeout=60, **options)

    def metric(self, name: str, **labels: str) -> float:
        """A value of /metrics."""
        for line in self.get("/metrics").text.splitlines():
            if line.startswith((f"{name}{{", f"{name} ")) and all(f'{k}="{v}"' in line for k, v in labels.items()):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no metric {name} {labels}")

    @property
    def engine_pid(self) -> int:
        [pid] = [int(found[1]) for line in self.log if (found := re.search(r"engine ready pid=(\d+)", line))]
        return pid

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def running(config: ServeConfig, env: dict[str, str] | None = None) -> Iterator[Server]:
    """A server that is ready; killed at the end if the test has not stopped it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serve.api.servers"],
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
        yield Server(url, process, log)
    except BaseException:
        sys.stderr.write("".join(log[-60:]))
        raise
    finally:
        process.kill()
        process.wait()


def encode(config: ServeConfig) -> str:
    """On two lines, because each part has its own paths."""
    engine = encode_engine_config(config.engine).decode()
    rest = {name: getattr(config, name) for name in config.__struct_fields__ if name != "engine"}
    return f"{engine}\n{msgspec.json.encode(rest).decode()}"


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


def main() -> None:
    import logging

    from flora.errors import FloraError
    from flora.serve.config import decode_engine_config

    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    engine, rest = sys.stdin.read().split("\n")
    try:
        serve(msgspec.convert({"engine": decode_engine_config(engine.encode())} | json.loads(rest), ServeConfig))
    except FloraError as error:
        logging.error("%s", error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
