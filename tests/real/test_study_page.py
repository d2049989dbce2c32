"""docs/study.md says what the rows of the study say: its tables, its drawings, and each claim that holds a number."""

import json

import pytest

from tests.real.scripts import script

page = script("study_page")


@pytest.fixture(scope="module")
def results():
    return page.Results(json.loads(line) for line in page.ROWS.read_text().splitlines())


def test_the_tables_are_made_of_the_rows(results):
    text = page.PAGE.read_text()

    assert page.fill(text, page.tables(results)) == text


def test_the_drawings_are_made_of_the_rows(results):
    for name, drawing in page.drawings(results).items():
        assert (page.PAGE.parent / name).read_text() == drawing, name


@pytest.mark.parametrize(("task", "questions"), [("lemma", 2000), ("g2p", 2001), ("sort", 400)])
def test_every_level_was_measured_on_every_question(results, task, questions):
    for level in script("levels").levels():
        assert results.row(task, level.how, level.scope, level.at)["questions"] == questions


def test_a_gpu_and_a_cpu_answer_alike_where_both_were_asked(results):
    study, rows = script("study"), [json.loads(line) for line in lines("real_study")]
    on_cpu = {(row["task"], row["how"], row["scope"], row["at"]): row for row in rows if row["questions"] == 400}
    compared = 0
    for row in results.rows():
        there = on_cpu.get((row["task"], row["how"], row["scope"], row["at"]))
        if row["device"] == "cuda" and there:
            compared += 1
            ours, theirs = (study.bits_of(each["right"], each["questions"])[:400] for each in (row, there))
            assert ours == theirs
    assert compared == 27


def test_a_share_is_counted_from_the_answers_themselves(results):
    study = script("study")
    for row in results.rows():
        right = study.bits_of(row["right"], row["questions"])
        tuned = study.bits_of(results.row(row["task"], "tuned")["right"], row["questions"])
        assert sum(right) / len(right) == row["exact_match"]
        if row["how"] != "tuned":
            pairs = list(zip(tuned, right, strict=True))
            assert (pairs.count((True, False)), pairs.count((False, True))) == (row["lost"], row["gained"])


def lost(results, *key) -> float:
    return page.points(results.row(*key))[0]


def test_lemma_keeps_its_skill_from_rank_16_on_and_not_below(results):
    for rank in (16, 32, 64, 128, 256):
        mean, error = page.points(results.row("lemma", "rank", "all", rank))
        assert mean < 2 * error
    assert 0 < lost(results, "lemma", "rank", "linear", 16) < 0.15
    for key in (("lemma", "rank", "linear", 64), ("lemma", "uncut", "linear")):
        mean, error = page.points(results.row(*key))
        assert mean < -2 * error  # better than the fine-tune
    assert 7 < lost(results, "lemma", "rank", "all", 8) < 8
    assert 24 < lost(results, "lemma", "rank", "all", 4) < 25
    assert results.row("lemma", "rank", "all", 16)["bytes"] < 0.0451 * 269e6
    assert 0.5 < results.row("lemma", "rank", "all", 16)["kept_share"] < 0.55


def test_g2p_lives_in_its_embeddings_and_keeps_its_skill_late(results):
    assert 16.5 < lost(results, "g2p", "uncut", "linear") < 17.5
    assert 7 < lost(results, "g2p", "rank", "all", 64) < 8
    assert 3.4 < lost(results, "g2p", "rank", "all", 128) < 3.6
    assert 1.5 < lost(results, "g2p", "rank", "all", 256) < 1.7
    assert lost(results, "g2p", "energy", "all", 0.9) > 1 > lost(results, "g2p", "energy", "all", 0.95)
    assert 0.82 < results.row("g2p", "energy", "all", 0.95)["bytes"] / 269e6 < 0.84


def test_pruning_equals_extracting(results):
    pruned = [row for row in results.rows() if row["how"] == "prune"]

    assert {row["task"] for row in pruned} == {"lemma", "g2p", "sort"}
    for row in pruned:
        extracted = extracted_at(results, row)
        assert row["equal_ranks"] in (1.0, pytest.approx(210 / 211))
        assert row["distance"] < (1.5e-3 if row["equal_ranks"] == 1.0 else 4e-3)
        assert row["lost"] - row["gained"] - (extracted["lost"] - extracted["gained"]) in (0, 1)
    assert sum(row["equal_ranks"] < 1 for row in pruned) == 2
    assert [row["task"] for row in pruned if row["right"] != extracted_at(results, row)["right"]] == ["g2p", "g2p"]


def extracted_at(results, row):
    return results.row(row["task"], "energy", "all", row["at"])


def test_kept_energy_does_not_compare_pairs(results):
    """lemma loses less with less of its change."""
    lemma, g2p = results.row("lemma", "rank", "linear", 16), results.row("g2p", "rank", "all", 64)

    assert lemma["kept_share"] < g2p["kept_share"] - 0.2
    assert page.points(lemma)[0] < page.points(g2p)[0]


def test_the_way_to_spend_bytes_that_keeps_the_most_energy_is_best_on_one_pair_and_worst_on_the_other(results):
    for task, size in (("lemma", 8), ("g2p", 32)):
        rows = {how: results.row(task, how, "all", size) for how in ("rank", "budget", "module energy")}
        assert max(rows, key=lambda how: rows[how]["kept_share"]) == "budget"
        assert (max if task == "g2p" else min)(rows, key=lambda how: rows[how]["exact_match"]) == "budget"
    assert only(results, ("g2p", 32), "budget", "module energy") == (114, 29)
    assert only(results, ("lemma", 8), "module energy", "budget") == (117, 28)
    for task, gain in (("g2p", 1.0), ("lemma", 0.0)):
        uniform, *others = (
            100 * results.row(task, how, "all", 128)["exact_match"] for how in ("rank", "budget", "module energy")
        )
        assert all(abs(other - uniform - gain) < 0.2 for other in others)


def only(results, pair, one: str, other: str) -> tuple[int, int]:
    """How many questions one way alone answers right, and how many the other."""
    study, (task, size) = script("study"), pair
    rows = [results.row(task, how, "all", size) for how in (one, other)]
    ways = [study.bits_of(row["right"], row["questions"]) for row in rows]
    pairs = list(zip(*ways, strict=True))
    return pairs.count((True, False)), pairs.count((False, True))


def test_a_small_share_left_behind_is_no_small_loss(results):
    assert results.row("sort", "tuned")["exact_match"] == 0.14
    assert results.row("sort", "uncut", "linear")["exact_match"] < 0.02
    assert 0.94 < results.row("sort", "rank", "linear", 256)["kept_share"] < 0.96
    mean, error = page.points(results.row("sort", "rank", "all", 32))
    assert mean < 2 * error
    assert abs(results.row("sort", "rank", "all", 32)["kept_share"] - 0.95) < 0.005
    assert abs(results.row("sort", "energy", "all", 0.95)["kept_share"] - 0.95) < 0.005
    assert 4.5 < lost(results, "sort", "energy", "all", 0.95) < 5.5
    assert 8 < lost(results, "sort", "energy", "all", 0.9) < 10


def test_an_energy_near_one_is_no_adapter(results):
    for task in ("lemma", "g2p"):
        assert 155e6 < results.row(task, "energy", "all", 0.9)["bytes"] < 165e6
        full = results.row(task, "energy", "all", 0.99)
        assert full["bytes"] > 269e6
        assert -0.3 < page.points(full)[0] < 0.3
    assert lost(results, "lemma", "energy", "all", 0.7) <= 0 < lost(results, "g2p", "energy", "all", 0.7)


def test_the_same_adapters_answer_the_same_through_peft_and_a_server(results):
    rows = [json.loads(line) for name in ("real_bytes", "real_accuracy") for line in lines(name)]
    for task in ("lemma", "g2p"):
        levels = [
            row for row in map(json.loads, lines("real_study")) if row["task"] == task and row["questions"] == 400
        ]
        [linear] = (row for row in levels if (row["how"], row["scope"], row["at"]) == ("rank", "linear", 64))
        same = [row for row in rows if "adapter_dtype" not in row]  # who compares dtypes has adapters of later code
        asked = [row for row in same if row["task"] == task and row["questions"] == 400]
        others = [row for row in asked if row.get("recipe") == "--rank 64" or row.get("rank") == 64]
        assert others
        assert {row["exact_match"] for row in others} == {linear["exact_match"]}


def lines(name: str) -> list[str]:
    return page.ROWS.with_name(f"{name}.jsonl").read_text().splitlines()
