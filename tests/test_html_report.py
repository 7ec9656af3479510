"""report.html: its content, its size, no network, no foreign HTML; in Chromium: width, errors, keyboard, themes."""

import json
import re
from html.parser import HTMLParser

import pytest
from chromium import PROGRAM, Chromium
from handmade import LENGTH, RANKS, finished, recommender
from matplotlib.backends.backend_agg import FigureCanvasAgg

from recbole_gr2.console import Console
from recbole_gr2.errors import MissingFileError
from recbole_gr2.report import build_result, read_run, render_report, write_report
from recbole_gr2.report.figures import FIGURES, gap, truth
from recbole_gr2.report.html import render_html, sampled_answers, to_html
from recbole_gr2.report.latex import DISPLAY
from recbole_gr2.report.page import Page
from recbole_gr2.seeds import combine

pytestmark = pytest.mark.slow  # Together they need a finished run and many seconds.

EVIL = '</script><img src=x onerror="window.evil=1"><b>&amp;\'|*x*'


class Elements(HTMLParser):
    """The elements of a page: the attributes of each tag, the text of each element with an id, and of each cell."""

    VOID = frozenset({"meta", "input", "img", "br", "hr", "link", "use", "path", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: dict[str, list[dict[str, str]]] = {}
        self.texts: dict[str, str] = {}
        self.cells: list[str] = []
        self._open: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.setdefault(tag, []).append(dict(attrs))
        if tag not in self.VOID:
            self._open.append((tag, dict(attrs).get("id") or ""))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if self._open and self._open[-1][0] in ("td", "th"):
            self.cells[-1] += data
        for _, name in self._open:
            if name:
                self.texts[name] = self.texts.get(name, "") + data


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run of one seed, its result, and its page."""
    run = finished(tmp_path_factory.mktemp("one"), entries=[recommender(-0.05, 60)], preset="laptop")
    result = build_result([run], run.command)
    return run, result, render_html(result, [run])


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Runs of three seeds, their result, and their page."""
    folder = tmp_path_factory.mktemp("three")
    runs = [finished(folder / str(seed), seed=seed, preset="laptop") for seed in (1, 2, 3)]
    result = combine(runs, "the command", 200)
    return runs, result, render_html(result, runs)


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """A run in which every text of the data, and of the user, is HTML."""
    folder = tmp_path_factory.mktemp("evil")
    data = folder / "data" / "evil"
    data.mkdir(parents=True)
    lines = [f"{item}\t{EVIL} {item}" for item in range(1, 91)]
    (data / "evil.item").write_text("\n".join(["item_id:token\ttitle:token_seq", *lines]) + "\n")
    users = [f"{EVIL}{n}" for n in range(6)]
    config = f"data_path: {data.parent}\ntext_title: title\n"
    part = {"slice": EVIL, "users": 3, "share": 0.5, "listed": 0.5, "ndcg@10": {"base": 0.5}}
    stages = {"mine": {"slices": [part], "protocol": {"split": EVIL}}}
    run = finished(folder, dataset="evil", config=config, users=users, preset="laptop", stages=stages)
    result = build_result([run], EVIL)
    for entry in result["methods"]:
        entry["description"] = EVIL
    result["settings"] = {EVIL: {"value": EVIL, "from": EVIL}}
    result["base_model"] = result["llm"] = EVIL
    return run, result, render_html(result, [run])


# --- content ---------------------------------------------------------------------------------------------------------


def test_the_page_has_the_sections_of_the_text(one):
    run, result, page = one
    elements = Elements(page)
    titles = re.findall(r"^## (.*)", render_report(result, [run]), re.MULTILINE)
    contents = re.findall(r'<li><a href="#([\w-]+)">(.*?)</a></li>', page)
    shown = [title for name, title in contents if name not in ("overview", "lists")]
    assert shown == [title for title in titles if title != "Examples"]
    assert all(elements.texts[name] == title for name, title in contents if name != "lists")
    assert "lists" in dict(contents) and 'id="lists"' in page
    assert page.index("No method is significantly ahead") < page.index("Contents")
    assert "smoke run" not in page


def test_the_page_has_every_figure_with_title_and_description(one):
    _, _, page = one
    elements = Elements(page)
    names = [attributes["aria-labelledby"].split() for attributes in elements.tags["svg"]]
    assert all(elements.texts[title] and elements.texts[text] for title, text in names)
    assert [title.removesuffix("-title") for title, _ in names] == [
        "differences-hit_users",
        "differences-all_users",
        "gap",
        "recall-by-k",
        "ndcg-by-k",
        "slices-hit-users",
        "ranks-prior",
        "ranks-sft",
        "truth",
        "semantic-ids",
        "curve-sft-loss",
        "curve-rl-reward",
        "curve-rl-unchanged",
        "cost",
    ]
    sft = next(entry for entry in one[1]["methods"] if (entry["method"], entry["scope"]) == ("sft", "hit_users"))
    diff = sft["vs_base"]["ndcg@10"]
    assert (
        f"sft {diff['diff']:+.4f} [{diff['low']:+.4f}, {diff['high']:+.4f}]"
        in elements.texts["differences-hit_users-desc"]
    )
    # Three of six targets are first by sft, and one in the base order.
    assert elements.texts["recall-by-k-desc"].startswith("base: K=1 0.1667") and "sft: K=1 0.5000" in page
    assert "better for 83.3%, the same for 0.0% and worse for 16.7%" in elements.texts["ranks-sft-desc"]
    assert "loss from 3.0000 to 1.0000" in elements.texts["curve-sft-loss-desc"]


def test_ids_are_unique_and_references_exist(one):
    _, _, page = one
    names = re.findall(r'\sid="([^"]+)"', page)
    assert len(names) == len(set(names))
    assert set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page)) <= set(names)


def test_tables_have_captions_and_scopes(one):
    elements = Elements(one[2])
    assert len(elements.tags["caption"]) == len(elements.tags["table"]) > 10
    assert {attributes["scope"] for attributes in elements.tags["th"]} == {"col", "row"}
    boxes = [attributes for attributes in elements.tags["div"] if attributes.get("class") == "scroll"]
    assert len(boxes) == len(elements.tags["table"])
    assert all(box["tabindex"] == "0" and box["aria-label"] and box["role"] == "region" for box in boxes)


def test_the_answers_are_those_of_the_run(one):
    run, result, page = one
    data = json.loads(Elements(page).texts["data"])
    assert data == sampled_answers(result, run)
    assert data["hit_users"] == 6 and data["methods"] == ["base", "prior", "sft", "shuffled"]
    for number, user in enumerate(data["users"]):
        assert user["id"] == "abcdef"[number] and len(user["candidates"]) == LENGTH
        place = user["candidates"].index(user["target"])
        assert {name: ranks[place] for name, ranks in user["ranks"].items()} == {
            name: RANKS[name][number] for name in data["methods"]
        }
        token, title = data["items"][user["target"]]
        assert token == str(number + 11)
        assert user["answers"] == {
            "sft": {
                "status": "ok",
                "reasoning": f"Best is [{title}] <b>",
                "statements": {"habit": False, "kind": False, "why": False},
            }
        }
    assert "All 6 hit users." in page


def test_a_sample_is_stated_and_always_the_same(one):
    run, result, _ = one
    chosen = [user["id"] for user in sampled_answers(result, run, users=3)["users"]]
    assert len(chosen) == 3 and chosen == sorted(chosen)
    assert chosen == [user["id"] for user in sampled_answers(result, run, users=3)["users"]]
    # The sample is halved until the lists fit.
    small = sampled_answers(result, run, size=1500)
    assert 1 <= len(small["users"]) < 6 and len(json.dumps(small)) < 2500 and small["hit_users"] == 6


def test_the_page_of_several_seeds(three):
    _, _, page = three
    assert "over the hit users of 3 seeds" in page and "The answers are those of seed 1." in page


def test_the_page_of_a_smoke_run(tmp_path):
    run = finished(tmp_path, llm=False)
    result = build_result([run], run.command)
    page = render_html(result, [run])
    assert '<p class="banner" role="note">This is a smoke run' in page
    assert "significantly ahead" not in page and "no verdict" in page


def test_moved_data_are_read_and_missing_ones_are_an_error(evil, tmp_path):
    run, result, _ = evil
    with pytest.raises(MissingFileError, match="no item texts"):
        render_html(result, [run], data_path=str(tmp_path))
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.item").write_text("item_id:token\ttitle:token_seq\n11\tMoved\n")
    assert '"Moved"' in render_html(result, [run], data_path=str(tmp_path))


def test_a_page_from_the_files_of_a_run_is_the_same(one):
    run, result, page = one
    write_report(run.path.parent, result, [run], Console())
    assert (run.path.parent / "report.html").read_text() == page and read_run(run.path) == run


# --- safety ----------------------------------------------------------------------------------------------------------


def test_texts_are_never_html(evil):
    run, result, page = evil
    elements = Elements(page)
    assert "img" not in elements.tags and "b" not in elements.tags and "em" not in elements.tags
    assert len(elements.tags["script"]) == page.count("</script>") == 2
    assert not any(
        name.startswith("on") for each in elements.tags.values() for attributes in each for name in attributes
    )
    data = json.loads(elements.texts["data"])
    assert data["users"][0]["id"] == f"{EVIL}0" and data["items"][0][1].startswith("</script>")
    assert EVIL in elements.cells and elements.texts["differences-hit_users-title"]
    assert "\n| \\</script>\\<img" in render_report(result, [run])


def test_markdown_is_rendered_without_its_html():
    html, headings = to_html(
        "## A <b>\n\nText <img src=x>, `code`, [x](javascript:alert(1)).\n\n| a | b |\n| --- | ---: |\n| c | 1 |"
    )
    assert headings == [{"id": "section-1", "title": "A <b>"}]
    assert "<img" not in html and "<b>" not in html and "<a " not in html and "<code>code</code>" in html
    assert '<th scope="row">c</th>' in html and '<caption class="hidden">' in html


def test_the_page_needs_no_network(one, three, evil):
    for page in (one[2], three[2], evil[2]):
        assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", page.replace(" // ", ""))
        elements = Elements(page)
        assert not {"link", "iframe", "object", "embed", "img"} & elements.tags.keys()
        assert not any("src" in attributes for each in elements.tags.values() for attributes in each)
        policy = next(m["content"] for m in elements.tags["meta"] if "content" in m and "default-src" in m["content"])
        assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy


def test_the_page_is_small(one):
    assert len(one[2].encode()) < 600_000


# --- figures as PDF --------------------------------------------------------------------------------------------------


def test_figures_are_vector_files(one, tmp_path):
    run, result, _ = one
    for draw in (gap, truth):
        (drawing,) = draw(Page(result=result, runs=[run]))
        path = drawing.save_pdf(tmp_path)
        content = path.read_bytes()
        width = float(re.search(rb"/MediaBox \[ 0 0 ([\d.]+)", content)[1])
        assert path.name == f"{drawing.name}.pdf" and content.startswith(b"%PDF")
        assert width == 252 and b"/Subtype /Image" not in content
        assert path.read_bytes() == drawing.save_pdf(tmp_path).read_bytes()  # without the time


def test_no_text_of_a_figure_is_cut_off(one):
    run, result, _ = one
    drawings = [drawing for draw in FIGURES for drawing in draw(Page(result=result, runs=[run], names=DISPLAY))]
    assert len(drawings) > 10
    for drawing in drawings:
        canvas = FigureCanvasAgg(drawing.figure)
        canvas.draw()
        (axes,) = drawing.figure.axes
        texts = [axes.xaxis.label, axes.yaxis.label, *axes.texts, *axes.get_yticklabels()]
        for text in texts:
            if text.get_text():
                box = text.get_window_extent(canvas.get_renderer())
                assert min(box.x0, box.y0) >= 0 and box.x1 <= drawing.figure.bbox.width, (drawing.name, text)
        assert axes.get_xlabel() and (axes.get_ylabel() or any(label.get_text() for label in axes.get_yticklabels()))


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if PROGRAM is None:
        pytest.skip("Chromium is not installed")
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def problems(browser) -> list:
    """What the browser complained about, and what it requested besides the file."""
    wrong = {"Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"}
    events = [event for event in browser.events if event["method"] in wrong]
    sent = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    browser.events.clear()
    return [*events, *(url for url in sent if not url.startswith("file:"))]


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_does_not_scroll_sideways(browser, one, evil, tmp_path, width):
    for name, page in (("one", one[2]), ("evil", evil[2])):
        (tmp_path / f"{name}.html").write_text(page)
        colors = []
        for dark in (False, True):
            browser.open(tmp_path / f"{name}.html", width=width, dark=dark)
            assert browser.value("document.documentElement.scrollWidth <= window.innerWidth")
            colors.append(browser.value("getComputedStyle(document.body).backgroundColor"))
        assert colors[0] == "rgb(255, 255, 255)" != colors[1]
        assert problems(browser) == []
    assert browser.value("window.evil") is None
    # Tables scroll in their boxes, and the first column stays.
    assert browser.value(
        "(() => { const box = [...document.querySelectorAll('.scroll')].find(b => b.scrollWidth > b.clientWidth + 50);"
        " if (!box) return 'no wide table'; const cell = box.querySelector('tbody th'); const before ="
        " cell.getBoundingClientRect().left; box.scrollLeft = 50; return box.scrollLeft === 50 &&"
        " Math.abs(cell.getBoundingClientRect().left - before) < 2; })()"
    )


@pytest.mark.slow
def test_a_user_is_chosen_with_the_keyboard(browser, one, tmp_path):
    (tmp_path / "one.html").write_text(one[2])
    browser.open(tmp_path / "one.html", width=1400)
    heading = "document.querySelector('#answer h3').textContent"
    assert browser.value(heading) == "User a: history"
    browser.value("document.getElementById('sort').focus()")
    browser.press("Tab", 9)
    assert browser.value("document.activeElement.id") == "user"
    browser.press("ArrowDown", 40)
    assert browser.value(heading) == "User b: history"
    text = browser.value("document.getElementById('answer').innerText")
    data = json.loads(Elements(one[2]).texts["data"])
    target = data["items"][data["users"][1]["target"]][1]
    assert target in text and f"Best is [{target}] <b>" in text and "habit false" in text
    # The name of a method orders its table.
    browser.value("document.querySelector('#answer button[data-method=sft]').focus()")
    browser.press("Enter", 13)
    assert browser.value("document.activeElement.dataset.method") == "sft"
    assert "ordered by sft" in browser.value("document.querySelectorAll('#answer caption')[1].textContent")
    # Search by title, and by id.
    browser.value("document.getElementById('search').focus()")
    browser.type(data["items"][data["users"][5]["candidates"][-1]][1])
    assert browser.value("document.querySelectorAll('#user option').length") >= 1
    assert browser.value("document.getElementById('found').textContent").endswith("of 6 users")
    browser.value("document.getElementById('search').select()")
    browser.type("no such title")
    assert browser.value("document.getElementById('found').textContent") == "0 of 6 users"
    assert problems(browser) == []
