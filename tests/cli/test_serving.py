"""`flora serve` started by its command, and asked by the official client and by Flora's own verbs."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from openai import AuthenticationError, NotFoundError, OpenAI
from transformers import AutoModelForCausalLM

from flora.cli import main
from flora.config import settings
from flora.demo.alphabet import START, decode, encode
from flora.demo.folders import load_model, save_model
from flora.demo.model import TinyLlama
from tests.cli.models import SHAPE, make_tuned
from tests.cli.schemas import check_answer
from tests.serving import running_server

POOL = ["--pool", "32MiB", "--host-cache", "16MiB", "--max-len", "128"]
PROMPT = "copy:abcdef="


@pytest.fixture(scope="module")
def world(base, tuned, tmp_path_factory):
    """A home with `sql@v1` (rank 8), `sql@v2` (rank 1) and a server of it, started without naming a base."""
    home = tmp_path_factory.mktemp("serving")
    flora(home, "extract", base, tuned, "--rank", 8, "--name", "sql")
    flora(home, "prune", "sql", "--rank", 1)
    with running_server(None, *POOL, env={"FLORA_HOME": str(home)}) as url:
        yield home, url


def flora(home, *words, code=0):
    """Stdout of one command, in this process."""
    line, out, err = [str(word) for word in words], io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("FLORA_HOME", str(home))
        settings.cache_clear()
        ended = main(line)
    settings.cache_clear()
    assert ended == code, err.getvalue()
    if "--json" in words:
        check_answer(line, json.loads(out.getvalue()), closed=True)
    return out.getvalue()


def greedy(model: str, url: str, **options) -> str:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    done = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0, **options)
    return done.choices[0].text


def test_base_adapter_and_version_answer_as_transformers_does_with_their_weights(world, base, tuned, tmp_path):
    home, url = world
    flora(home, "export", "sql@v1", "--out", tmp_path / "v1")
    flora(home, "export", "sql@v2", "--out", tmp_path / "v2")

    assert greedy("tiny-base", url) == transformers_greedy(base)
    assert greedy("sql", url) == greedy("sql@v1", url) == transformers_greedy(base, tmp_path / "v1")
    assert greedy("sql@v2", url) == transformers_greedy(base, tmp_path / "v2")


def transformers_greedy(base, adapter=None):
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    prompt = torch.tensor([[START, *encode(PROMPT)]])
    ids = model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    return decode(ids.tolist())


def test_an_adapter_that_is_made_while_the_server_runs_is_served(world, base, tmp_path):
    home, url = world
    with pytest.raises(NotFoundError):
        greedy("late", url)

    flora(home, "extract", base, make_tuned(base, tmp_path / "late", seed=9), "--rank", 8)
    flora(home, "export", "late", "--out", tmp_path / "exported")

    assert greedy("late", url) == transformers_greedy(base, tmp_path / "exported")


def test_a_moved_alias_counts_from_the_next_request_on(world):
    home, url = world
    assert greedy("sql", url) == greedy("sql@v1", url)

    flora(home, "promote", "sql@v2")
    try:
        assert greedy("sql", url) == greedy("sql:prod", url) == greedy("sql@v2", url)
    finally:
        flora(home, "promote", "sql@v1")


def test_run_prints_what_the_server_says(world):
    home, url = world

    said = flora(home, "run", "sql@v1", PROMPT, "--max-tokens", 12, "--server", url)
    told = json.loads(flora(home, "run", "sql@v1", PROMPT, "--max-tokens", 12, "--server", url, "--json"))
    chat = flora(home, "run", "sql@v1", "hello", "--chat", "--max-tokens", 3, "--server", url)

    assert said == greedy("sql@v1", url) + "\n"
    assert told["text"] == said[:-1]
    assert told["usage"]["prompt_tokens"] == len(PROMPT) + 1
    assert told["finish_reason"] in ("stop", "length")
    assert chat.endswith("\n")


def test_load_unload_and_ps_tell_where_adapters_are(world):
    home, url = world
    loaded = json.loads(flora(home, "load", "sql@v2", "--server", url, "--json"))
    everything = {row["model"]: row for row in json.loads(flora(home, "ps", "-a", "--server", url, "--json"))["models"]}
    unloaded = json.loads(flora(home, "unload", "sql@v2", "--server", url, "--json"))

    assert loaded["ref"] == unloaded["ref"] == "sql@v2"
    assert loaded["load_ms"] >= 0
    assert unloaded["was_loaded"] is True
    assert set(everything) >= {"tiny-base", "sql"}
    assert flora(home, "run", "nobody", "x", "--server", url, code=5) == ""


def test_ps_lists_a_version_that_its_name_does_not_mean_now_and_unload_takes_its_digest(world):
    home, url = world
    current, other = ("sql@v2", "sql@v1") if greedy("sql", url) == greedy("sql@v2", url) else ("sql@v1", "sql@v2")
    flora(home, "load", current, "--server", url)
    digest = json.loads(flora(home, "load", other, "--server", url, "--json"))["serving_digest"]

    rows = {row["version"]: row for row in json.loads(flora(home, "ps", "--server", url, "--json"))["models"]}
    flora(home, "unload", digest, "--server", url)
    after = json.loads(flora(home, "ps", "--server", url, "--json"))["models"]

    assert rows[current]["model"] == "sql"
    assert rows[digest]["model"].startswith("sql")
    assert rows[digest]["place"] == "cpu"
    assert digest not in [row["version"] for row in after]


def test_with_a_key_file_only_its_keys_open_the_door(world, base, tmp_path):
    home, _ = world
    keys = tmp_path / "keys"
    keys.write_text("# two keys\nfirst-key\n\n second-key \n")

    with running_server(base, "--api-key-file", str(keys), *POOL, env={"FLORA_HOME": str(home)}) as url:
        with pytest.raises(AuthenticationError):
            greedy("tiny-base", url)
        flora(home, "run", "tiny-base", PROMPT, "--server", url, code=4)
        for key in ("first-key", "second-key"):
            flora(home, "run", "tiny-base", PROMPT, "--max-tokens", 2, "--server", url, "--api-key", key)


def test_a_preloaded_adapter_is_in_memory_before_the_first_request(world, base):
    home, _ = world
    flags = ["--preload", "sql@v1", "--base-name", "house", "--log-json"]

    with running_server(base, *flags, *POOL, env={"FLORA_HOME": str(home)}) as url:
        rows = {
            row["model"]: row["place"] for row in json.loads(flora(home, "ps", "--server", url, "--json"))["models"]
        }

    assert rows == {"house": "memory", "sql": "cpu"}


def test_the_server_refuses_a_preload_that_is_not_there(home_with_an_adapter, base):
    command = [sys.executable, "-m", "flora", "serve", str(base), "--port", "0", "--preload", "nobody", *POOL]

    assert subprocess.run(command, env=os.environ | {"FLORA_HOME": str(home_with_an_adapter)}).returncode == 5


def test_the_demos_model_is_the_llama_that_transformers_knows(tuned):
    """Else the demo's accuracies of checkpoints would be of another model than the one it serves."""
    tokens = torch.tensor([[START, *encode("vigenere:abcdef=fmqisk")]])

    ours = load_model(tuned, SHAPE)(tokens)
    theirs = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)(tokens).logits

    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_demos_model_takes_a_chat_as_the_prompt_that_was_said_last(tmp_path):
    from transformers import AutoTokenizer

    save_model(TinyLlama(SHAPE), tmp_path)
    said = [{"role": "system", "content": "be brief"}, {"role": "user", "content": PROMPT}]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    told = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    assert tokenizer(told, add_special_tokens=False)["input_ids"] == [START, *encode(PROMPT)]


def test_the_demos_tokenizer_is_the_one_that_transformers_reads(base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)

    assert tokenizer(PROMPT)["input_ids"] == [START, *encode(PROMPT)]
    assert tokenizer.decode(encode("a b=c.")) == "a b=c."
    assert tokenizer.eos_token_id == 2
