"""`flora serve --allow-base-mismatch`: an adapter on another base than its own, as the operator wished, on record."""

import torch
from openai import OpenAI
from peft import PeftModel
from transformers import AutoModelForCausalLM

from flora.demo.alphabet import START, decode, encode
from tests.cli.models import make_base
from tests.serving import running_server

PROMPT = "copy:abcdef="


def test_an_adapter_is_served_on_another_base_by_permission_and_that_is_noted_for_good(stored, home, tmp_path):
    """The answer is PEFT's, with that adapter on that base."""
    other = make_base(tmp_path / "other-base", seed=7)
    stored("export", "sql", "--out", tmp_path / "sql")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32), tmp_path / "sql"
    )
    prompt = torch.tensor([[START, *encode(PROMPT)]])
    expected = model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert stored("show", "sql", "--json").json["mismatches"] == []

    flags = ["--allow-base-mismatch", "--pool", "32MiB", "--host-cache", "16MiB", "--max-len", "128"]
    with running_server(other, *flags, env={"FLORA_HOME": str(home)}) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        answer = client.completions.create(model="sql", prompt=PROMPT, max_tokens=12, temperature=0)

    assert answer.choices[0].text == decode(expected)
    shown = stored("show", "sql", "--json").json
    (noted,) = shown["mismatches"]
    assert noted["base_id"] != shown["base_id"]
    assert stored("registry", "events", "--json").json["events"][-1]["op"] == "mismatch"
    assert stored("fsck", "--json").json["problems"] == []
