"""`flora inspect --plot`: one file that needs nothing else, whose figures are those of the factors."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from flora.adapter import BaseBinding, ChangeReport, Recipe, TensorChange, make_adapter
from flora.cli.svg import Axis
from flora.portrait import curve, place, portrait
from tests.core.test_prune import DELTAS, extracted, residual


class Page(HTMLParser):
    """What the page is made of; fails where a tag is closed that was not open."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def tags(self, name):
        return [attrs for tag, attrs in self.seen if tag == name]


@pytest.fixture
def page(stored, tmp_path):
    stored("inspect", "sql", "--plot", tmp_path / "sql.html", "-q")
    return Page((tmp_path / "sql.html").read_text())


def test_the_page_is_whole_and_fetches_nothing(stored, tmp_path):
    stored("inspect", "sql", "--plot", tmp_path / "sql.html")

    text = (tmp_path / "sql.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not page.tags("script") + page.tags("link") + page.tags("img")
    assert not re.search(r"https?://|url\(|@import|src=", text)
    assert str(tmp_path) not in text


def test_the_page_has_colors_for_light_and_for_dark(stored, tmp_path):
    stored("inspect", "sql", "--plot", tmp_path / "sql.html")

    style = re.search(r"<style>(.*?)</style>", (tmp_path / "sql.html").read_text(), re.DOTALL)[1]
    light, dark = style.split("prefers-color-scheme: dark", 1)
    variables = set(re.findall(r"(--[\w-]+):", light))
    assert variables == set(re.findall(r"(--[\w-]+):", dark.split("} }", 1)[0]))
    assert set(re.findall(r"var\((--[\w-]+)\)", style)) - {"--c"} <= variables
    assert not re.search(r"(?:fill|stroke|background|color): #", style.replace("color-scheme", ""))


def test_every_module_has_a_spectrum_and_a_field_in_each_map(page):
    lines = [attrs["class"] for attrs in page.tags("polyline")]

    assert len([style for style in lines if "thin" in style]) == 14
    assert len([style for style in lines if style == "curve all"]) == 1
    assert len([attrs for attrs in page.tags("g") if "cell" in (attrs.get("class") or "")]) == 2 * 14
    for word in ("90 %", "95 %", "99 %", "mlp.up_proj", "Energy against rank"):
        assert word in page.text


def test_a_folder_is_drawn_too(flora, base, tuned, tmp_path):
    flora("extract", base, tuned, "--rank", 2, "--out", tmp_path / "adapter")

    flora("inspect", tmp_path / "adapter", "--plot", tmp_path / "page.html")

    assert "model.layers.1.mlp.down_proj" in (tmp_path / "page.html").read_text()


def test_a_folder_is_no_place_for_a_page(stored, tmp_path):
    assert "is a folder" in stored("inspect", "sql", "--plot", tmp_path, code=2).err


def test_names_are_text_and_no_markup(tmp_path):
    from flora.cli.page import make_page

    adapter = extracted(DELTAS, rank=3)
    text = make_page("<script>alert(1)</script>", [("base", "a<b>&c")], portrait(adapter))

    assert not Page(text).tags("script") + Page(text).tags("b")


def test_energy_against_rank_is_what_numpy_finds_of_the_cut_factors():
    adapter = extracted(DELTAS, rank=20, dtype=torch.float32)

    found = portrait(adapter).whole()

    total = sum(float(delta.square().sum()) for delta in DELTAS.values())
    for rank in (0, 1, 5, 20):
        lost = 0.0
        for name, delta in DELTAS.items():
            factors = adapter.factors[name]
            cut = type(factors)(A=factors.A[:rank], B=factors.B[:, :rank], scale=factors.scale)
            lost += residual(delta, cut)
        assert found.shares[rank] == pytest.approx(1 - lost / total, abs=1e-6)
    first = int(np.argmax(np.array(found.shares) >= 0.9))
    assert found.rank_for(0.9) == first
    assert found.rank_for(0.999999) is None


def test_a_module_of_fewer_terms_keeps_what_it_has_at_higher_ranks():
    short, long = portrait(extracted(DELTAS, rank=4)).modules[0], portrait(extracted(DELTAS, rank=9)).modules[0]

    both = curve("both", [short, long])

    assert len(both.shares) == 10
    assert both.shares[9] == pytest.approx((short.kept + long.kept) / (short.norm_squared + long.norm_squared))


def test_modules_are_placed_by_their_first_number():
    assert place("model.layers.3.mlp.up_proj") == (3, "mlp.up_proj")
    assert place("model.layers.3.mlp.experts.12.up_proj") == (3, "mlp.experts.*.up_proj")
    assert place("lm_head") == (None, "lm_head")
    assert place("conv1x1") == (None, "conv1x1")


def test_axes_have_round_ticks_inside_their_ends():
    assert Axis("x", 0, 64).ticks() == [0, 20, 40, 60]
    assert Axis("x", 0.0, 1.0).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Axis("y", 0.03, 1.2, is_log=True).ticks() == pytest.approx([0.05, 0.1, 0.2, 0.5, 1.0])
    assert Axis("y", 1e-8, 1.0, is_log=True).ticks()[0] == pytest.approx(1e-8)


def test_an_adapter_without_a_record_is_drawn_against_itself():
    factors = extracted(DELTAS, rank=5).factors
    adapter = make_adapter(factors, BaseBinding(name="org/tiny", base_id=None), Recipe(operation="import"))

    assert portrait(adapter).whole().shares[-1] == pytest.approx(1)


def test_a_change_of_zero_energy_breaks_nothing():
    from flora.cli.page import make_page

    record = ChangeReport(tensors=(TensorChange(name="m.weight", shape=(2, 2), status="unchanged", norm_squared=0.0),))
    factors = {"m": extracted(DELTAS, rank=1).factors[next(iter(DELTAS))]}
    nothing = {"m": type(factors["m"])(A=0 * factors["m"].A, B=factors["m"].B)}
    base = BaseBinding(name="org/tiny", base_id=None)

    Page(make_page("nothing", [], portrait(make_adapter(nothing, base, Recipe(operation="import"), record))))
