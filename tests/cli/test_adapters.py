"""The life of an adapter by commands: made, cut, looked at, pointed to, taken out, exported, imported, pushed."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file as load_numpy

from tests.cli.models import make_base, make_tuned


def test_extract_registers_what_it_makes_and_tells_the_whole_story(flora, base, tuned):
    done = flora("extract", base, tuned, "--rank", 8, "--name", "sql", "--json")

    (adapter,) = done.json["adapters"]
    assert done.json["schema_version"] == 1
    assert adapter["ref"] == "sql@v1"
    assert adapter["max_rank"] == 8
    assert adapter["num_modules"] == 14
    assert adapter["kept_share"] < adapter["kept_share_of_modules"] <= 1
    assert {"embeddings", "norms"} == {group["kind"] for group in adapter["left_out"]}
    assert {tensor["status"] for tensor in adapter["tensors"]} == {"extracted", "not_extractable", "unchanged"}
    assert len(adapter["tensors"]) == 20  # every tensor of the pair


def test_extract_says_where_its_time_went(flora, base, tuned, tmp_path):
    adapter = flora("extract", base, tuned, "--rank", 4, "--out", tmp_path / "timed", "--json").json["adapters"][0]

    seconds = adapter["seconds"]
    assert seconds["write"] > 0
    assert seconds["total"] >= seconds["work"]
    assert adapter["num_workers"] * seconds["work"] >= seconds["read"] + seconds["delta"] + seconds["factorize"]
    assert adapter["peak_device_bytes"] is None


def test_the_kept_energy_that_extract_reports_is_that_of_numpy(flora, base, tuned, tmp_path):
    adapter = flora("extract", base, tuned, "--rank", 3, "--out", tmp_path / "out", "--json").json["adapters"][0]

    name = "model.layers.1.mlp.up_proj"
    told = next(tensor for tensor in adapter["tensors"] if tensor["name"] == f"{name}.weight")
    delta = float32(tuned, f"{name}.weight") - float32(base, f"{name}.weight")
    energies = np.linalg.svd(delta, compute_uv=False) ** 2
    assert told["norm_squared"] == pytest.approx(energies.sum(), rel=1e-6)
    assert told["kept"] / told["norm_squared"] == pytest.approx(energies[:3].sum() / energies.sum(), abs=1e-4)


def float32(folder, name):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")[name].double().numpy()


def test_without_a_rule_extract_takes_rank_64(flora, base, tuned):
    assert flora("extract", base, tuned, "--json").json["adapters"][0]["max_rank"] == 32 * 2  # the smallest side is 32


def test_an_energy_target_holds_for_every_module(flora, base, tuned):
    done = flora("extract", base, tuned, "--energy", 0.9, "--json")

    extracted = [row for row in done.json["adapters"][0]["tensors"] if row["status"] == "extracted"]
    assert all(row["kept"] >= 0.9 * row["norm_squared"] for row in extracted)
    assert all(row["rank"] <= 4 for row in extracted)


def test_a_budget_bounds_the_stored_bytes(flora, base, tuned):
    adapter = flora("extract", base, tuned, "--budget", "10kB", "--json").json["adapters"][0]

    factors = [row["rank"] * sum(row["shape"]) * 2 for row in adapter["tensors"] if row["status"] == "extracted"]
    assert 9_000 < sum(factors) <= 10_000


def test_the_default_name_is_the_folders(flora, base, tuned):
    flora("extract", base, tuned, "--rank", 2)

    assert flora("ls", "-q").out.split() == ["tiny-tuned"]


def test_with_out_alone_nothing_is_registered(flora, base, tuned, home, tmp_path):
    flora("extract", base, tuned, "--rank", 2, "--out", tmp_path / "adapter")

    assert {"adapter_config.json", "adapter_model.safetensors", "flora.json"} <= set(names_in(tmp_path / "adapter"))
    assert not (home / "registry").exists()


def test_with_name_and_out_it_goes_to_both(flora, base, tuned, tmp_path):
    flora("extract", base, tuned, "--rank", 2, "--name", "both", "--out", tmp_path / "adapter")

    assert flora("ls", "-q").out.split() == ["both"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_same_inputs_and_seed_give_the_same_digests(flora, base, tuned, tmp_path):
    first, second = (
        flora("extract", base, tuned, "--rank", 4, "--registry", tmp_path / where, "--json").json["adapters"][0]
        for where in ("one", "two")
    )

    assert first["digest"] == second["digest"]
    assert first["serving_digest"] == second["serving_digest"]


def test_several_fine_tunes_are_extracted_in_one_go(flora, base, tuned, tmp_path):
    other = make_tuned(base, tmp_path / "other-tuned", seed=2)

    flora("extract", base, tuned, other, "--rank", 2)

    assert flora("ls", "-q").out.split() == ["other-tuned", "tiny-tuned"]


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(flora, base, tuned, home):
    plan = flora("extract", base, tuned, "--rank", 8, "--dry-run", "--json").json["plans"][0]

    assert (plan["num_extractable"], plan["num_tensors"], plan["max_rank"]) == (14, 20, 8)
    assert 0 < plan["seconds"] < 60
    assert not (home / "registry").exists()


def test_extract_warns_where_the_skill_may_lie_in_the_embeddings(flora, base, tmp_path):
    tuned = make_tuned(base, tmp_path / "tuned", table_change=0.5)

    done = flora("extract", base, tuned, "--rank", 8)

    assert "of the whole change lies in embeddings" in done.err


def test_ls_lists_one_line_per_name(stored, base, tuned):
    stored("extract", base, tuned, "--rank", 2, "--name", "sql")
    stored("extract", base, tuned, "--rank", 4, "--name", "team/other")

    heading, *rows = stored("ls").rows
    adapters = stored("ls", "--json").json["adapters"]

    assert heading[:4] == ["name", "version", "aliases", "rank"]
    assert [row[:4] for row in rows] == [["sql", "2", "latest=2", "2"], ["team/other", "1", "latest=1", "4"]]
    assert [adapter["versions"] for adapter in adapters] == [2, 1]
    assert stored("ls", "team/", "-q").out.split() == ["team/other"]


def test_ls_of_a_registry_that_is_not_there_yet_is_empty(flora):
    assert flora("ls", "--json").json["adapters"] == []


def test_show_tells_identities_base_and_lineage(stored):
    stored("prune", "sql", "--rank", 3)

    facts = stored("show", "sql@v2", "--json").json

    assert facts["operation"] == "prune"
    assert facts["base"] == "tiny-base"
    assert facts["parents"] == [stored("show", "sql@v1", "--json").json["digest"]]
    assert facts["aliases"] == {"latest": 1}
    assert [version["version"] for version in facts["versions"]] == [1, 2]
    assert dict(stored("show", "sql@v2").rows)["ref"] == "sql@v2"


def test_inspect_shows_rank_and_energy_of_each_module_and_what_was_left(stored):
    modules = stored("inspect", "sql", "--spectra", "--json").json["modules"]

    by_name = {row["module"]: row for row in modules}
    q = by_name["model.layers.0.self_attn.q_proj"]
    assert q["rank"] == 8
    assert q["kept"] > 0.98
    assert q["rank_90%"] <= 4
    assert q["singular_values"] == sorted(q["singular_values"], reverse=True)
    assert by_name["model.embed_tokens.weight"]["rank"] == 0
    assert sum(row["share"] for row in modules) == pytest.approx(1)


def test_prune_makes_a_new_version_and_moves_no_alias(stored):
    done = stored("prune", "sql", "--energy", 0.8, "--json").json

    assert (done["ref"], done["parent"], done["was_cut"]) == ("sql@v2", "sql@v1", True)
    assert done["num_bytes"] < done["parent_bytes"]
    assert 0.8 <= done["kept_share_of_modules"] < 1
    assert stored("show", "sql", "--json").json["aliases"] == {"latest": 1}


def test_prune_that_cuts_nothing_makes_nothing(stored):
    done = stored("prune", "sql", "--rank", 64, "--json").json

    assert (done["was_cut"], done["ref"]) == (False, "sql@v1")
    assert len(stored("show", "sql", "--json").json["versions"]) == 1


def test_a_dry_prune_writes_nothing(stored):
    done = stored("prune", "sql", "--rank", 2, "--dry-run", "--json").json

    assert done["max_rank"] == 2
    assert len(stored("show", "sql", "--json").json["versions"]) == 1


def test_aliases_are_tagged_promoted_and_rolled_back(stored):
    stored("prune", "sql", "--rank", 2, "--alias", "small")
    stored("promote", "sql@v1")
    stored("promote", "sql:small", "--reason", "smaller")

    assert stored("show", "sql", "-q").out.strip() == "sql@v2"
    assert stored("rollback", "sql", "--json").json["ref"] == "sql@v1"
    assert stored("tag", "sql@v2", "canary", "--json").json == {
        "schema_version": 1,
        "id": "sql:canary",
        "ref": "sql@v2",
        "digest": stored("show", "sql@v2", "--json").json["digest"],
        "previous": None,
        "dry_run": False,
    }
    assert stored("show", "sql", "--json").json["aliases"] == {"canary": 2, "latest": 1, "prod": 1, "small": 2}


def test_rm_takes_versions_out_and_gc_frees_their_bytes(stored):
    stored("prune", "sql", "--rank", 2)

    assert stored("rm", "sql@v2", "-q").out.split() == ["sql@v2"]
    assert stored("gc", "--grace", 0, "--dry-run", "--json").json["num_removed"] > 0
    freed = stored("gc", "--grace", 0, "--json").json

    assert freed["num_bytes"] > 0
    assert stored("fsck", "--json").json["problems"] == []


def test_fsck_of_a_damaged_registry_names_the_damage_and_exits_3(stored, home):
    blobs = [path for path in (home / "registry" / "blobs").rglob("*") if path.is_file()]
    blob = max(blobs, key=lambda path: path.stat().st_size)  # the weights
    blob.chmod(0o600)
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)

    done = stored("fsck", code=3)

    assert "damaged" in done.out
    assert "error[FL-CHECK]" in done.err


def test_an_exported_adapter_is_imported_with_its_digests(stored, tmp_path):
    for profile in ("compact", "portable"):
        stored("export", "sql", "--profile", profile, "--out", tmp_path / profile)
        stored("import", tmp_path / profile, "--name", f"again-{profile}")

        again = stored("show", f"again-{profile}", "--json").json
        assert again["serving_digest"] == stored("show", "sql", "--json").json["serving_digest"]


def test_a_portable_export_has_one_rank_and_peft_reads_it(stored, base, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stored("export", "sql", "--profile", "portable", "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")

    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 8, {})
    assert len([name for name, _ in model.named_parameters() if "lora_A" in name]) == 14


def test_a_foreign_adapter_is_imported(stored, base, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    targets = ["q_proj", "up_proj"]
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "foreign")

    stored("import", tmp_path / "foreign", "--name", "foreign")

    facts = stored("show", "foreign", "--json").json
    assert (facts["operation"], facts["num_modules"], facts["max_rank"], facts["base_id"]) == ("import", 4, 4, None)


def test_an_import_is_bound_to_the_base_that_is_given(flora, base, tuned, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "foreign")
    flora("extract", base, tuned, "--rank", 2, "--name", "own")

    flora("import", tmp_path / "foreign", "--name", "foreign", "--base", base)

    own, foreign = (flora("show", name, "--json").json for name in ("own", "foreign"))
    assert foreign["base_id"] == own["base_id"]


def test_an_adapter_of_floras_is_not_bound_to_other_weights(flora, base, tuned, tmp_path):
    flora("extract", base, tuned, "--rank", 2, "--out", tmp_path / "own")
    other = make_base(tmp_path / "other", seed=5)

    done = flora("import", tmp_path / "own", "--name", "own", "--base", other, code=1)

    assert "error[FL-BASE]" in done.err
    assert flora("ls", "-q").out == ""


def test_a_dry_push_shows_the_files_and_the_card(stored):
    plan = stored("push", "sql", "someone/sql-adapter", "--dry-run", "--json").json

    assert plan["url"] is None
    assert {file["file"] for file in plan["files"]} >= {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    for line in ("base_model_relation: adapter", "library_name: peft"):
        assert line in plan["card"]
    assert "base_model_relation: adapter" in stored("push", "sql", "someone/sql-adapter", "--dry-run").out


def test_the_numbers_in_an_exported_file_are_the_factors_of_the_change(flora, base, tuned, tmp_path):
    flora("extract", base, tuned, "--rank", 8, "--dtype", "float32", "--out", tmp_path / "out")

    weights = load_numpy(tmp_path / "out" / "adapter_model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    product = weights[f"base_model.model.{name}.lora_B.weight"] @ weights[f"base_model.model.{name}.lora_A.weight"]
    delta = float32(tuned, f"{name}.weight") - float32(base, f"{name}.weight")

    assert np.linalg.norm(product - delta) ** 2 / np.linalg.norm(delta) ** 2 < 0.02


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())
