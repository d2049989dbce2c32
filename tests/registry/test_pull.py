"""Pulling from the Hub, with the real client against a Hub on this machine that misbehaves when asked to."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import peft
import pytest
import torch

from flora.adapter import Adapter
from flora.errors import (
    AdapterInvalid,
    AuthError,
    NotFound,
    PickleRefused,
    RemoteError,
    Unsupported,
)
from flora.registry.formats.peft import save_peft
from flora.registry.remotes.http import _check_redirect
from flora.registry.remotes.pulling import Pulled, pull
from flora.registry.remotes.pushing import plan_push, push
from flora.registry.remotes.transfer import Limits
from tests.registry.adapters import Q_PROJ, UP_PROJ, random_adapter
from tests.registry.hub_server import TOKEN, Hub, Repo, serve_hub

REPO = "ann/sql-lora"
WEIGHTS = "adapter_model.safetensors"
USUAL = Limits(num_attempts=3, first_wait_s=0.01)


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    with serve_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def get(tmp_path):
    """Pulls REPO, and tries again soon."""

    def run(limits: Limits = USUAL, **options) -> Pulled:
        return pull(REPO, tmp_path / "staging", limits=limits, **options)

    return run


def files_of(adapter: Adapter, folder: Path, profile="compact", *, own: bool = True) -> dict[str, bytes]:
    save_peft(adapter, folder, profile)
    return {path.name: path.read_bytes() for path in folder.iterdir() if own or path.name != "flora.json"}


@pytest.fixture
def repo(hub, tmp_path) -> Repo:
    """A repository with a LoRA that Flora did not make."""
    hub.repos[REPO] = repo = Repo()
    repo.keep({**files_of(random_adapter(), tmp_path / "made", own=False), "README.md": b"# Hello", "x.py": b"1/0"})
    return repo


def edit(repo: Repo, **changes: object) -> None:
    """Another commit, whose adapter_config.json says something else."""
    config = json.loads(repo.files["adapter_config.json"]) | changes
    repo.keep({**repo.files, "adapter_config.json": json.dumps(config).encode()})


def product(adapter: Adapter, module: str) -> torch.Tensor:
    factors = adapter.factors[module]
    return factors.scale * factors.B.double() @ factors.A.double()


# What arrives


@pytest.mark.parametrize("profile", ["compact", "portable"])
def test_what_flora_pushed_comes_back_with_its_digests(registry, hub, get, profile):
    adapter = random_adapter(ranks={Q_PROJ: 4, UP_PROJ: 2}, extras={"chat_template.jinja": b"{{ messages }}"})
    pushed = registry.add(adapter, "sql")
    push(plan_push(adapter, pushed, REPO, profile=profile))

    pulled = get()

    assert pulled.is_floras
    assert pulled.revision == hub.repos[REPO].commits[-1]
    assert registry.add(pulled.adapter, "sql") == pushed  # the same version: its digest is equal


def test_anyones_lora_is_imported_with_its_base_claimed_and_not_proven(repo, get):
    pulled = get()

    assert not pulled.is_floras
    assert pulled.adapter.header.base.name == "org/tiny"
    assert pulled.adapter.header.base.base_id is None
    assert torch.equal(product(pulled.adapter, Q_PROJ), product(random_adapter(), Q_PROJ))


def test_only_the_adapters_own_files_are_fetched(repo, hub, get):
    get()

    fetched = {path.rpartition("/")[2] for method, path in hub.requests if "/resolve/" in path}
    assert fetched == {"adapter_config.json", WEIGHTS}


def test_what_peft_saves_with_rslora_and_rank_patterns_computes_the_same(hub, get, tmp_path):
    """PEFT itself is the judge: its own product for each module."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(32, 32), "up_proj": torch.nn.Linear(32, 48)})
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 2},
        alpha_pattern={"up_proj": 3},
        init_lora_weights=False,
    )
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "theirs")
    hub.repos[REPO] = Repo()
    hub.repos[REPO].keep({path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()})
    edit(hub.repos[REPO], auto_mapping=None)  # which PEFT writes for a model of no transformers class

    adapter = get().adapter

    assert {name: lowrank.rank for name, lowrank in adapter.factors.items()} == {"q_proj": 4, "up_proj": 2}
    for name in ("q_proj", "up_proj"):
        theirs = wrapped.base_model.model[name].get_delta_weight("default")
        torch.testing.assert_close(product(adapter, name).float(), theirs.detach(), rtol=1e-5, atol=1e-6)


def test_a_revision_is_a_branch_a_tag_or_a_commit(repo, hub, get, tmp_path):
    first = repo.commits[-1]
    repo.at("main")  # the server keeps it
    repo.keep(files_of(random_adapter(1), tmp_path / "newer", own=False))

    assert torch.equal(product(get(revision=first).adapter, Q_PROJ), product(random_adapter(0), Q_PROJ))
    assert torch.equal(product(get(revision="main").adapter, Q_PROJ), product(random_adapter(1), Q_PROJ))
    with pytest.raises(NotFound, match="no revision v9"):
        get(revision="v9")


# What is refused, and when


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "whole tensors"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"auto_mapping": {"base_model_class": "x"}}, "imports nothing"),
    ],
)
def test_what_is_no_plain_lora_is_refused_with_its_reason_before_a_weight_is_fetched(repo, hub, get, changes, reason):
    edit(repo, **changes)

    with pytest.raises(Unsupported, match=reason):
        get()
    assert not [path for _, path in hub.requests if path.endswith(WEIGHTS)]


def test_pickled_weights_are_never_fetched(repo, hub, get):
    files = {name: data for name, data in repo.files.items() if name != WEIGHTS}
    repo.keep({**files, "adapter_model.bin": b"\x80\x02"})

    with pytest.raises(PickleRefused, match=r"adapter_model\.bin"):
        get()
    assert not [path for _, path in hub.requests if "/resolve/" in path]


def test_pickled_weights_beside_safetensors_are_left_there(repo, get):
    repo.keep({**repo.files, "adapter_model.bin": b"\x80\x02"})

    assert get().adapter.header.max_rank == 4


def test_a_full_checkpoint_is_told_apart(repo, get):
    repo.keep({"config.json": b"{}", "model.safetensors": b"x"})

    with pytest.raises(AdapterInvalid, match=r"no adapter_config\.json") as refused:
        get()
    assert "flora extract" in refused.value.fix


def test_more_bytes_than_allowed_are_not_fetched(repo, hub, get):
    with pytest.raises(RemoteError, match="more than the 1000"):
        get(Limits(max_bytes=1000))
    assert not [path for _, path in hub.requests if path.endswith(WEIGHTS)]


def test_a_missing_repository_is_not_found(hub, get):
    with pytest.raises(NotFound, match="ann/sql-lora"):
        get()


def test_a_wrong_token_and_a_gated_repository_are_auth_errors(repo, get, monkeypatch):
    repo.is_gated = True
    with pytest.raises(AuthError, match="gated"):
        get()
    repo.is_gated = False
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")

    with pytest.raises(AuthError) as refused:
        get()
    assert "hf auth login" in refused.value.fix
    assert "hf_wrong" not in str(refused.value)


# Faults on the way


def test_a_truncated_body_is_gone_on_with_where_it_ended(repo, hub, get):
    size = len(repo.files["adapter_config.json"])
    hub.truncate = [size, 300, 200]

    pulled = get()

    assert hub.offsets == [0, 0, 300, 500]
    assert torch.equal(product(pulled.adapter, UP_PROJ), product(random_adapter(), UP_PROJ))


def test_a_pull_that_gave_up_goes_on_next_time(repo, hub, get):
    hub.truncate = [len(repo.files["adapter_config.json"]), 300, 0, 0, 0]
    with pytest.raises(RemoteError, match="broke off at 300 of") as gave_up:
        get()
    assert "goes on" in gave_up.value.fix
    hub.truncate, hub.offsets = [], []

    get()

    assert hub.offsets == [300]  # neither the config nor the first 300 bytes came again


def test_bytes_of_another_digest_are_not_kept(repo, hub, get, tmp_path):
    hub.corrupt = 99

    with pytest.raises(RemoteError, match="not what it says it is"):
        get()
    assert not [path for path in (tmp_path / "staging").rglob("*") if path.name.startswith("adapter_")]
    hub.corrupt = 0
    assert get().adapter.header.max_rank == 4


def test_a_damaged_beginning_is_fetched_again(repo, hub, get):
    """A resumed file may be wrong before the place where it was resumed: one more attempt from the start."""
    hub.truncate = [len(repo.files["adapter_config.json"]), 300]
    hub.before_file = lambda repo: setattr(hub, "corrupt", 1 if hub.offsets and hub.offsets[-1] == 0 else 0)

    with pytest.raises(RemoteError, match=r"not what|broke off"):
        get(Limits(num_attempts=1))
    hub.before_file, hub.truncate = (lambda repo: None), []

    assert get().adapter.header.max_rank == 4


def test_a_revision_that_moves_meanwhile_changes_nothing(repo, hub, get, tmp_path):
    other = files_of(random_adapter(7), tmp_path / "other", own=False)
    hub.before_file = lambda repo: repo.files.update(other) or repo.commits.append("f" * 40)
    repo.at("main")

    pulled = get()

    assert pulled.revision != "f" * 40
    assert torch.equal(product(pulled.adapter, Q_PROJ), product(random_adapter(0), Q_PROJ))


@pytest.mark.parametrize("part", ["/api/models/", "/resolve/"])
def test_a_hub_that_asks_to_wait_is_waited_for(repo, hub, get, part):
    hub.busy[part] = 2

    assert get().adapter.header.max_rank == 4


def test_a_hub_that_is_busy_for_good_is_an_error_of_ours(repo, hub, get):
    hub.busy["/resolve/"] = 999

    with pytest.raises(RemoteError, match="broke off") as gave_up:
        get()
    assert "429" in gave_up.value.cause


@pytest.mark.parametrize("pause_s", [0.02, 2.0])
def test_a_stalled_or_dripping_stream_is_given_up(repo, hub, get, pause_s):
    hub.pause_s = pause_s

    with pytest.raises(RemoteError, match="broke off"):
        get(replace(USUAL, stall_s=0.3))


def test_the_token_is_not_sent_to_another_host(repo, hub, get):
    with serve_hub() as other:
        other.repos = hub.repos
        hub.elsewhere = other.address

        get()

        assert set(hub.tokens_seen) == {f"Bearer {TOKEN}"}
        assert set(other.tokens_seen) == {None}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("https://huggingface.co/a", "http://huggingface.co/a"),
        ("https://huggingface.co/a", "https://169.254.169.254/latest/meta-data"),
        ("https://huggingface.co/a", "https://127.0.0.1/a"),
        ("https://huggingface.co/a", "https://[::1]/a"),
        ("http://huggingface.co/a", "file:///etc/passwd"),
    ],
)
def test_a_redirect_into_this_network_or_out_of_encryption_is_refused(source, target):
    with pytest.raises(RemoteError, match="redirects to"):
        _check_redirect(source, target, "ann/x")


def test_two_pulls_of_one_state_do_not_meet(repo, hub, get, tmp_path):
    refused: list[RemoteError] = []

    def meanwhile(_: Repo) -> None:
        hub.before_file = lambda repo: None
        with pytest.raises(RemoteError, match="another process") as error:
            get()
        refused.append(error.value)

    hub.before_file = meanwhile

    get()

    assert len(refused) == 1


def test_progress_reaches_the_end_and_never_goes_back(repo, get):
    shares: list[float] = []

    get(report=lambda share, what: shares.append(share))

    assert shares == sorted(shares)
    assert shares[-1] == 1.0
