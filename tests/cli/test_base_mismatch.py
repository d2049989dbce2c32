"""`flora serve --allow-base-mismatch`: an adapter on another base than its own, by its operator's will and on record."""

import json
import os
import subprocess
import sys

import pytest
import torch
from openai import BadRequestError, OpenAI
from peft import PeftModel
from transformers import AutoModelForCausalLM

from flora.demo.alphabet import START, decode, encode
from tests.cli.models import make_base
from tests.serving import running_server

PROMPT = "copy:abcdef="


def answer(url: str, model: str) -> str:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    return client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0).choices[0].text


def flora_json(home, *words):
    command = [sys.executable, "-m", "flora", *map(str, words), "--json"]
    done = subprocess.run(command, env=os.environ | {"FLORA_HOME": str(home)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_adapter_of_another_base_is_served_by_permission_alone_and_that_is_noted(stored, home, tmp_path):
    """Merged or beside the weights, the answer is PEFT's with that adapter on that base."""
    other = make_base(tmp_path / "other-base", seed=7)
    stored("export", "sql", "--out", tmp_path / "sql")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32), tmp_path / "sql"
    )
    prompt = torch.tensor([[START, *encode(PROMPT)]])
    expected = decode(
        model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()
    )
    serving = {"FLORA_HOME": str(home)}
    small = ["--pool", "32MiB", "--host-cache", "16MiB", "--max-len", "128"]

    with running_server(other, *small, env=serving) as url:
        with pytest.raises(BadRequestError, match="other base"):
            answer(url, "sql")
    assert flora_json(home, "show", "sql")["mismatches"] == []

    with running_server(other, *small, "--allow-base-mismatch", env=serving) as url:
        assert answer(url, "sql") == expected
    (noted,) = flora_json(home, "show", "sql")["mismatches"]
    assert noted["base_id"] != flora_json(home, "show", "sql")["base_id"]
    assert flora_json(home, "registry", "events")["events"][-1]["op"] == "mismatch"
    assert flora_json(home, "fsck")["problems"] == []

    with running_server(other, *small, "--allow-base-mismatch", "--merge", "sql", env=serving) as url:
        assert answer(url, "sql") == expected
    assert flora_json(home, "show", "sql")["mismatches"] == [noted]
