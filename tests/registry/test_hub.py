"""Pushing to the Hub, with the real client against a Hub on this machine."""

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml

from flora.adapter import CHAT_TEMPLATE, ChangeReport, Recipe, TensorChange, make_adapter
from flora.errors import AuthError, RemoteError, UsageError
from flora.portrait import portrait
from flora.registry.formats.peft import load_peft
from flora.registry.remotes.pushing import PushPlan, plan_push, push
from tests.registry.adapters import BASE, Q_PROJ, UP_PROJ, random_adapter
from tests.registry.hub_server import TOKEN, Hub, serve_hub

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "flora.json"]


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    with serve_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # Xet is a service of its own
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def plan(registry, repo: str = "ann/sql-lora", seed: int = 0, **options) -> PushPlan:
    adapter = random_adapter(seed, ranks={Q_PROJ: 4, UP_PROJ: 2}, extras=options.pop("extras", None))
    return plan_push(adapter, registry.add(adapter, "sql"), repo, **options)


def test_a_push_makes_the_repository_and_commits_every_file(registry, hub, tmp_path):
    planned = plan(registry)

    address = push(planned)

    assert address == f"{hub.address}/ann/sql-lora"
    repo = hub.repos["ann/sql-lora"]
    assert sorted(repo.files) == FILES
    assert [file.name for file in planned.files] == FILES
    assert {file.name: file.num_bytes for file in planned.files} == {
        name: len(data) for name, data in repo.files.items()
    }
    assert repo.messages == [planned.message]
    assert "sql@v1" in planned.message
    assert ("PUT", f"/lfs/{next(iter(hub.objects))}") in hub.requests  # the weights went as an LFS object


def test_what_was_pushed_has_the_serving_digest_of_what_is_here(registry, hub, tmp_path):
    push(plan(registry))
    for name, data in hub.repos["ann/sql-lora"].files.items():
        (tmp_path / name).write_bytes(data)

    assert load_peft(tmp_path).header == random_adapter().header


def test_pushing_again_replaces_what_flora_wrote_and_leaves_the_rest(registry, hub):
    push(plan(registry, extras={CHAT_TEMPLATE: b"x"}))
    repo = hub.repos["ann/sql-lora"]
    repo.files["LICENSE"] = b"MIT"
    assert CHAT_TEMPLATE in repo.files
    first = repo.files["adapter_model.safetensors"]

    push(plan(registry, seed=1))

    assert sorted(repo.files) == ["LICENSE", *FILES]
    assert repo.files["adapter_model.safetensors"] != first


def test_a_commit_by_someone_else_meanwhile_is_not_overwritten(registry, hub):
    push(plan(registry))
    hub.before_commit = lambda repo: repo.commits.append("f" * 40)

    with pytest.raises(RemoteError, match="changed while it was being pushed to"):
        push(plan(registry, seed=1))
    assert len(hub.repos["ann/sql-lora"].messages) == 1


def test_a_repository_can_be_made_private(registry, hub):
    push(plan(registry, is_private=True))
    push(plan(registry, repo="ann/open"))

    assert hub.repos["ann/sql-lora"].is_private
    assert not hub.repos["ann/open"].is_private


def test_a_wrong_token_is_an_auth_error_with_a_fix(registry, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")

    with pytest.raises(AuthError, match="refuses") as refused:
        push(plan(registry))
    assert "hf auth login" in refused.value.fix
    assert "hf_wrong" not in str(refused.value)
    assert hub.repos == {}


@pytest.mark.parametrize("part", ["/commit/", "/preupload/", "/objects/batch"])
@pytest.mark.parametrize(("status", "kind"), [(403, AuthError), (400, RemoteError)])
def test_a_refusal_at_any_step_is_an_error_of_ours(registry, hub, part, status, kind):
    hub.broken[part] = status

    with pytest.raises(kind):
        push(plan(registry))
    assert hub.repos["ann/sql-lora"].files == {}


def test_an_upload_that_breaks_is_an_error_of_ours(registry, hub):
    hub.broken["^/lfs/"] = 400

    with pytest.raises(RemoteError, match="failed") as refused:
        push(plan(registry))
    assert refused.value.fix
    assert hub.repos["ann/sql-lora"].files == {}


def test_a_hub_that_cannot_be_reached_is_an_error_of_ours(registry, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    with pytest.raises(RemoteError, match="cannot be reached"):
        push(plan(registry))


@pytest.mark.parametrize(
    "repo", ["", "sql-lora", "a/b/c", "ann/../x", "ann/..", "ann/a b", "https://host/x", "ann/" + "x" * 200]
)
def test_what_is_no_hub_id_is_refused_before_anything_is_sent(registry, repo):
    with pytest.raises(UsageError):
        plan(registry, repo=repo)


def test_a_plan_leaves_nothing_behind(registry):
    planned = plan(registry)
    folder = planned.folder
    assert folder.is_dir()

    del planned

    assert not folder.exists()


# The card


def card(adapter, registry) -> str:
    return plan_push(adapter, registry.add(adapter, "sql"), "ann/sql-lora").card


def with_report(*tensors: TensorChange, recipe: Recipe | None = None):
    adapter = random_adapter()
    return make_adapter(adapter.factors, BASE, recipe or adapter.header.recipe, ChangeReport(tensors=tensors))


def change(name: str, norm: float, kept: float = 0.0, status="extracted", reason=None) -> TensorChange:
    rank = 4 if status == "extracted" else None
    return TensorChange(name=name, shape=(2, 2), status=status, norm_squared=norm, kept=kept, rank=rank, reason=reason)


REPORT = (
    change("model.layers.0.self_attn.q_proj.weight", 40.0, 30.0),
    change("model.layers.1.self_attn.q_proj.weight", 10.0, 10.0),
    change("model.layers.0.mlp.up_proj.weight", 25.0, 20.0),
    change("model.embed_tokens.weight", 20.0, status="not_extractable", reason="an embedding"),
    change("model.norm.weight", 5.0, status="excluded"),
    change("lm_head.weight", 0.0, status="unchanged"),
)


def test_the_cards_metadata_is_what_the_hub_looks_for(registry):
    _, front, _ = card(random_adapter(), registry).split("---\n", 2)

    metadata = yaml.safe_load(front)
    assert metadata == {
        "base_model": "org/tiny",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "flora", "peft", "extracted"],
    }


def test_the_card_tells_what_each_kind_of_module_keeps(registry):
    text = card(with_report(*REPORT), registry)

    assert "| `q_proj` | 2 | 4 | 80.00 % | 50.00 % |" in text
    assert "| `up_proj` | 1 | 4 | 80.00 % | 25.00 % |" in text
    assert "| **all extracted** | 3 | 4 | 80.00 % | 75.00 % |" in text
    assert "| **whole change** | 5 | | **60.00 %** | 100.00 % |" in text


def test_the_card_draws_energy_against_rank(registry):
    adapter = with_report(*REPORT)
    shares = portrait(adapter).whole().shares

    text = card(adapter, registry)

    drawn = re.findall(r"^rank +(\d+)  ([█░]+) +([\d.]+) %$", text, re.MULTILINE)
    assert [int(rank) for rank, _, _ in drawn][-1] == len(shares) - 1
    for rank, bar, percent in drawn:
        assert float(percent) == pytest.approx(100 * shares[int(rank)], abs=0.05)
        assert len(bar) == 40
        assert bar.count("█") == pytest.approx(40 * shares[int(rank)], abs=0.51)
    assert "flora prune sql --rank" in text


def test_the_card_tells_what_the_adapter_does_not_carry(registry):
    text = card(with_report(*REPORT), registry)

    assert "25.00 % of the change lies in tensors that are no part of it." in text
    assert "| `model.embed_tokens.weight` | 20.00 % | an embedding |" in text
    assert "| `model.norm.weight` | 5.00 % | excluded |" in text
    assert "lm_head" not in text


def test_a_long_list_is_summed_up(registry):
    left = [change(f"t{i}", 1.0, status="not_extractable") for i in range(20)]

    assert "| 8 more | 40.00 % | |" in card(with_report(*left), registry)


def test_nothing_left_out_needs_no_words(registry):
    assert "does not carry" not in card(random_adapter(), registry)


@pytest.mark.parametrize(
    ("recipe", "command"),
    [
        (
            Recipe(operation="extract", tuned_name="ann/tuned", options={"rank": 64, "energy": 0.95, "seed": 0}),
            "flora extract org/tiny ann/tuned --rank 64 --energy 0.95",
        ),
        (
            Recipe(operation="extract", tuned_name="my model", options={"include": "*.mlp.*,*.q_proj", "rank": None}),
            "flora extract org/tiny 'my model' --include '*.mlp.*' --include '*.q_proj'",
        ),
        (
            Recipe(operation="prune", parents=("sha256:" + "a" * 64,), options={"budget_bytes": 1000}),
            f"flora prune NAME@sha256:{'a' * 64} --budget 1000",
        ),
    ],
)
def test_the_card_has_the_command_that_makes_it_again(registry, recipe, command):
    assert f"```\n{command}\n```" in card(with_report(recipe=recipe), registry)


def test_the_card_shows_how_to_use_it_and_what_it_is(registry):
    text = card(random_adapter(), registry)
    version = registry.resolve("sql")

    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("org/tiny"), "ann/sql-lora")' in text
    assert "vllm serve org/tiny --enable-lora --max-lora-rank 8 --lora-modules sql=ann/sql-lora" in text
    assert "flora serve org/tiny" in text
    assert version.digest in text
    assert version.serving_digest in text
    assert BASE.base_id in text
    assert not re.search(r"(^|[\s`(])/(home|root|tmp|work)/", text)


def test_the_card_of_an_import_claims_no_extraction(registry):
    text = card(with_report(recipe=Recipe(operation="import", method="peft")), registry)

    assert "extracted" not in yaml.safe_load(text.split("---\n", 2)[1])["tags"]


# Xet


@pytest.fixture
def xet(hub: Hub, monkeypatch, tmp_path) -> Path:
    """A Hub as it is today, with Xet storage: a folder, which hf_xet's own client writes to."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "cache"))
    hub.xet = f"local://{tmp_path / 'xet'}"
    return tmp_path / "xet"


def test_where_the_hub_has_xet_the_weights_go_there_and_their_sha256_is_checked_all_the_same(registry, hub, xet):
    planned = plan(registry)

    push(planned)

    weights = hub.repos["ann/sql-lora"].files["adapter_model.safetensors"]
    sizes = {file.name: file.num_bytes for file in planned.files}
    assert weights.size == sizes["adapter_model.safetensors"]
    assert hub.objects == {}  # nothing went as an LFS object
    stored = [path for path in xet.rglob("default.*") if path.suffix != ".tagset"]
    assert len(stored) == 1  # one file's chunks
    assert ("GET", "/api/models/ann/sql-lora/xet-write-token/main") in hub.requests


@pytest.mark.parametrize(
    ("status", "error", "fix"), [(403, AuthError, "HF_TOKEN"), (404, RemoteError, "HF_HUB_DISABLE_XET=1")]
)
def test_xet_storage_that_refuses_is_an_error_with_a_fix(registry, hub, xet, status, error, fix):
    """hf_xet has one word for all of it: ConnectionError."""
    hub.broken = {"xet-write-token": status}

    with pytest.raises(error) as refused:
        push(plan(registry))
    assert fix in refused.value.fix
    assert str(status) in refused.value.cause
