"""What does an adapter keep of a fine-tune's skill, by rank, by energy, pruned, and at equal bytes?

    FLORA_FIXTURES=KIT python benchmarks/real/study.py --device cuda --out benchmarks/results/real_study.jsonl
    python benchmarks/real/study.py --pair TASK BASE TUNED --questions 400 --out ROWS.jsonl

Each row is one adapter, extracted by Flora as `flora extract` does it and merged by hand onto one base in memory, which
answers the test side's questions in float32. Greedy answers are told by little more than one forward pass (judge.py),
not decoded token by token. A row's `right` has one bit a question, so that any two rows can be compared question by
question; `lost` and `gained` count that against the fine-tune. Rows that --out holds already are not measured again.
study_page.py reads the rows.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from canvas import Canvas
from judge import Judge, Verdict
from levels import STORED, Level, levels
from pairs import Pair, commit, kit_pair, own_pair
from torch import Tensor, nn
from transformers import AutoTokenizer

import flora
from flora.adapter import Adapter
from flora.checkpoint import open_checkpoint
from flora.extract import ExtractConfig, Wish, extract, plan_extraction
from flora.lowrank import LowRank, component_energies
from flora.prune import prune
from flora.rank import RankRule, rank_for_energy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default="lemma,g2p", help="of the kit")
    parser.add_argument("--pair", nargs=3, metavar=("TASK", "BASE", "TUNED"), help="a pair of finetune.py instead")
    parser.add_argument("--questions", type=int, help="the first so many; default: the whole test side")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, help="keep checkpoints here, and use those that are there")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        os.environ.setdefault("FLORA_HOME", str(work / "home"))
        if args.pair:
            task, base, tuned = args.pair
            pairs: Iterator[Pair] = iter([own_pair(task, Path(base), Path(tuned), args.questions)])
        else:
            pairs = (kit_pair(task, work, args.questions) for task in args.tasks.split(","))
        for pair in pairs:
            study = Study(pair, args.device, args.out, work / "hashes")
            for level in levels():
                study.measure(level)


class Study:
    """One pair, and what of it is measured already."""

    def __init__(self, pair: Pair, device: str, out: Path | None, cache_dir: Path) -> None:
        self._pair, self._device, self._out, self._cache_dir = pair, device, out, cache_dir
        self._base, self._tuned = open_checkpoint(pair.base), open_checkpoint(pair.tuned)
        self._facts = {"task": pair.task, "questions": len(pair.examples), "device": device, "dtype": "float32"}
        self._rows = {key_of(row): row for row in _read(out)}
        self._extracted: tuple[tuple[Any, ...], Adapter] | None = None

    def measure(self, level: Level) -> dict[str, Any]:
        """The level's row: read, or measured, printed and written."""
        named = {"how": level.how, "scope": level.scope, "at": level.at}
        if (row := self._rows.get(key_of(self._facts | named))) is not None:
            return row
        start = time.perf_counter()
        with self._model(level) as (model, kept):
            made_s = time.perf_counter() - start
            verdict = self._judge(model)
        row = self._facts | named | kept | self._figures(level, verdict)
        row["seconds"] = {"make": round(made_s, 1), "judge": round(time.perf_counter() - start - made_s, 1)}
        row |= {"flora": flora.__version__, "torch": torch.__version__, "commit": commit()}
        shown = {name: value for name, value in row.items() if name != "right"}
        print(json.dumps(shown), flush=True)
        if self._out:
            with self._out.open("a") as out:
                out.write(json.dumps(row) + "\n")
        self._rows[key_of(row)] = row
        return row

    def _figures(self, level: Level, verdict: Verdict) -> dict[str, Any]:
        figures = {"exact_match": verdict.exact_match, "stderr": verdict.stderr, "nll": verdict.nll}
        if level.how != "tuned":
            tuned = bits_of(self.measure(Level("tuned"))["right"], len(verdict.right))
            pairs = list(zip(tuned, verdict.right, strict=True))
            figures |= {"lost": pairs.count((True, False)), "gained": pairs.count((False, True))}
        return figures | {"right": digits_of(verdict.right)}

    @contextmanager
    def _model(self, level: Level) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
        """The model of that level, and what it keeps."""
        if level.how == "base":
            yield self._canvas.model, {}
        elif level.how == "tuned":
            with self._canvas.with_tensors(self._tuned, self._base.tensors) as model:
                yield model, {}
        elif level.how == "uncut":
            plan = plan_extraction(self._base, self._tuned, ExtractConfig(RankRule(max_rank=1)))
            names = [pair.name for pair in plan.extractable]
            with self._canvas.with_tensors(self._tuned, names) as model:
                yield model, {}
        else:
            adapter, more = self._adapter(level)
            with self._canvas.with_adapter(adapter) as model:
                yield model, _kept(adapter) | more

    def _adapter(self, level: Level) -> tuple[Adapter, dict[str, Any]]:
        assert level.scope is not None
        assert level.at is not None
        if level.how == "rank":
            return self._extract(level.scope, RankRule(max_rank=int(level.at))), {}
        if level.how == "energy":
            return self._extract(level.scope, RankRule(energy=level.at)), {}
        if level.how == "prune":
            rule = RankRule(energy=level.at)
            extracted, pruned = self._extract(level.scope, rule), prune(self._stored, rule, None)
            assert pruned is not None
            return pruned, _compare(pruned, extracted, self._device)
        num_bytes = _bytes_at_rank(self._stored, int(level.at))
        if level.how == "budget":
            return self._extract(level.scope, RankRule(budget_bytes=num_bytes)), {"of_bytes": num_bytes}
        energy = _energy_for_bytes(self._stored, num_bytes)
        return self._extract(level.scope, RankRule(energy=energy)), {"of_bytes": num_bytes, "energy": energy}

    def _extract(self, scope: str, rule: RankRule) -> Adapter:
        if (scope, rule) == ("all", RankRule(energy=STORED)):
            return self._stored
        return self._extract_anew(scope, rule)

    def _extract_anew(self, scope: str, rule: RankRule) -> Adapter:
        key = (scope, rule)
        if self._extracted is None or self._extracted[0] != key:  # a pruned level comes right after the extracted one
            wish = Wish(embeddings=scope == "all", vectors=scope == "all")
            config = ExtractConfig(rule, wish=wish, device=self._device, cache_dir=self._cache_dir)
            self._extracted = key, extract(self._base, self._tuned, config).adapter
        return self._extracted[1]

    @cached_property
    def _stored(self) -> Adapter:
        """The adapter that is pruned."""
        return self._extract_anew("all", RankRule(energy=STORED))

    @cached_property
    def _canvas(self) -> Canvas:
        return Canvas(self._pair.base, self._device)

    @cached_property
    def _judge(self) -> Judge:
        return Judge(AutoTokenizer.from_pretrained(self._pair.base), self._pair.examples)


def _kept(adapter: Adapter) -> dict[str, Any]:
    report, ranks = adapter.report, [module.rank for module in adapter.header.modules]
    assert report is not None
    exact_bytes = sum(tensor.numel() * tensor.element_size() for tensor in adapter.exact.values())
    return {
        "bytes": sum(factors.num_bytes for factors in adapter.factors.values()) + exact_bytes,
        "ranks": [min(ranks), max(ranks)],
        "kept_share_of_modules": report.extracted_share,
        "kept_share": report.kept_share,
    }


def _compare(pruned: Adapter, extracted: Adapter, device: str) -> dict[str, Any]:
    """How many modules have equal ranks, and how far the two changes are from each other, relative to their norm."""
    apart = norm = 0.0
    for name, factors in extracted.factors.items():
        change = _dense(factors, device)
        apart += float((_dense(pruned.factors[name], device) - change).double().square().sum())
        norm += float(change.double().square().sum())
    equal = sum(factors.rank == pruned.factors[name].rank for name, factors in extracted.factors.items())
    return {"equal_ranks": equal / len(extracted.factors), "distance": math.sqrt(apart / norm)}


def _dense(factors: LowRank, device: str) -> Tensor:
    return factors.scale * (factors.B.to(device).float() @ factors.A.to(device).float())


def _bytes_at_rank(adapter: Adapter, rank: int) -> int:
    """What factors of this uniform rank take."""
    return sum(
        min(rank, factors.in_features, factors.out_features) * factors.bytes_per_rank
        for factors in adapter.factors.values()
    )


def _energy_for_bytes(adapter: Adapter, num_bytes: int) -> float:
    """The energy that takes `num_bytes`, nearly, when each module keeps that much: by bisection on stored spectra."""
    assert adapter.report is not None
    norms = {name: change.norm_squared for name, change in adapter.report.by_name().items()}
    spectra = {name: component_energies(factors).sqrt() for name, factors in adapter.factors.items()}
    low, high = 0.0, STORED
    for _ in range(14):
        energy = (low + high) / 2
        ranks = {name: rank_for_energy(values, norms[f"{name}.weight"], energy) for name, values in spectra.items()}
        taken = sum(rank * adapter.factors[name].bytes_per_rank for name, rank in ranks.items())
        low, high = (energy, high) if taken <= num_bytes else (low, energy)
    return round(low, 4)


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("task", "questions", "device", "dtype", "how", "scope", "at"))


def _read(path: Path | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


def digits_of(bits: tuple[bool, ...]) -> str:
    """Hexadecimal, one digit for each four bits, the first of them the highest."""
    nibbles = ("".join("01"[bit] for bit in bits[i : i + 4]).ljust(4, "0") for i in range(0, len(bits), 4))
    return "".join(f"{int(nibble, 2):x}" for nibble in nibbles)


def bits_of(text: str, count: int) -> list[bool]:
    """The first `count` bits of such digits."""
    return [digit == "1" for nibble in text for digit in f"{int(nibble, 16):04b}"][:count]


if __name__ == "__main__":
    main()
