"""report.html: the sections of report.md, figures, and the answers of a sample of users, in one file.

The file needs no network: style sheet, script, figures and data are inside. Texts of the data set are data for the
script, which shows them as texts and never as HTML. The content security policy of the file forbids every request, and
every script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from recbole_gr2.config import load_settings, read_yaml
from recbole_gr2.prompts import shorten
from recbole_gr2.report import figures, page
from recbole_gr2.report.answers import described
from recbole_gr2.report.figures import Drawing
from recbole_gr2.report.page import Page
from recbole_gr2.report.result import ORACLE, FinishedRun
from recbole_gr2.report.tables import GAP, data_title
from recbole_gr2.report.verdict import banner, verdict

USERS = 300  # largest number of users whose answers are in the file
DATA_BYTES = 3_000_000  # largest size of these answers; there are fewer users if they need more
TITLE_CHARS = 100
Figures = tuple[Callable[[Page], list[Drawing]], ...]
OVERVIEW: Figures = (figures.differences, figures.gap, figures.by_cutoff)
WITH_FIGURES: Mapping[Callable[[Page], str], Figures] = {
    page.slices_section: (figures.slices,),
    page.moves_section: (figures.moves,),
    page.candidates_section: (figures.depth,),
    page.semantic_ids_section: (figures.codes,),
    page.truth_section: (figures.truth,),
    page.curves_section: (figures.curves,),
    page.cost_section: (figures.cost,),
}
LISTS = "Lists and answers of users"
LISTS_AFTER = page.reading_section
LEFT_OUT = (page.title_section, page.examples_section)  # The page has the title, and the answers in their place.


def render_html(result: Mapping[str, Any], runs: Sequence[FinishedRun], *, data_path: str | None = None) -> str:
    """Return report.html.

    Args:
        result: content of result.json.
        runs: the finished run of each seed.
        data_path: folder that contains the folder of the data set, if it is not that of the run any more.

    Raises:
        MissingFileError: the item file of the data set is missing.
    """
    report = Page(result=result, runs=runs)
    environment = Environment(
        loader=PackageLoader("recbole_gr2.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = environment.get_template("report.js").render().strip()
    overview = {"id": "overview", "title": "Overview"}
    contents = [overview]
    sections = [
        {
            "heading": Markup('<h2 id="{id}">{title}</h2>').format(**overview),
            "figures": _shown(report, OVERVIEW),
            "html": "",
        }
    ]
    lists_after = 0
    for section in page.SECTIONS:
        html, headings = to_html("" if section in LEFT_OUT else section(report), len(contents))
        if html:
            end = html.index("</h2>") + len("</h2>") if headings else 0
            contents += headings
            drawn = _shown(report, WITH_FIGURES.get(section, ()))
            sections.append({"heading": Markup(html[:end]), "figures": drawn, "html": Markup(html[end:])})
        if section is LISTS_AFTER:
            lists_after = len(sections)
            contents.append({"id": "lists", "title": LISTS})
    answers = sampled_answers(result, runs[0], data_path=data_path)
    return environment.get_template("report.html.j2").render(
        result=result,
        title=f"GR2 on {data_title(result)}",
        seeds=", ".join(map(str, result["seeds"])),
        banner=banner(result),
        verdict=[Markup(to_html(sentence)[0]) for sentence in verdict(result, report.language_models)],
        metric=GAP.upper(),
        contents=contents,
        lists_after=lists_after,
        lists_title=LISTS,
        sections=sections,
        answers=answers,
        data=Markup(_json(answers)),
        style=Markup(environment.get_template("report.css").render()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
    )


def _shown(report: Page, drawn: Figures) -> list[dict[str, str]]:
    """Title and SVG of the figures of a section."""
    drawings = [drawing for figure in drawn for drawing in figure(report)]
    return [{"title": each.title, "svg": Markup(each.svg())} for each in drawings]


def sampled_answers(
    result: Mapping[str, Any],
    run: FinishedRun,
    *,
    users: int = USERS,
    size: int = DATA_BYTES,
    data_path: str | None = None,
) -> dict[str, Any]:
    """Return the test lists of hit users, with the order and the reasoning of each method.

    Args:
        result: content of result.json.
        run: the finished run of the first seed.
        users: largest number of users. If there are more hit users, it is a random sample, always the same one.
        size: largest size in bytes as JSON. If the lists need more, the sample is halved until they fit.
        data_path: folder of the data sets, if it moved.

    Returns:
        `hit_users`, their number; `seed` of the run; `methods`; `items`, [token, title] of each item; and `users`. A
        user has `id`; `earlier`, the number of history items that are left out; `history`, `candidates` and `target`,
        places in `items`; `ranks`, for each method the rank of each candidate; and `answers` of the methods that give
        reasoning: `status`, `reasoning`, and `statements` or null.
    """
    hits = run.per_user()["user"].tolist()
    moved = {} if data_path is None else {"data_path": data_path}
    settings = load_settings(config_dict=read_yaml(run.config), command_line=moved)
    order = np.random.default_rng(0).permutation(len(hits))
    places = sorted(order[:users].tolist())
    lists = dict(zip(places, described(result, run.folders, settings, [hits[place] for place in places]), strict=True))
    while True:
        answers = _answers([lists[place] for place in sorted(order[:users].tolist())])
        count = len(answers["users"])
        if count <= 1 or len(_json(answers).encode("utf-8")) <= size:
            return {"hit_users": len(hits), "seed": run.seed, **answers}
        users = count // 2


def _answers(lists: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Replace the items of lists by their places in a list of items."""
    places: dict[str, int] = {}
    items: list[list[str]] = []

    def place(item: Mapping[str, Any]) -> int:
        if item["item"] not in places:
            places[item["item"]] = len(items)
            items.append([item["item"], shorten(item["title"], TITLE_CHARS)])
        return places[item["item"]]

    users = [
        {
            "id": each["user"],
            "earlier": each["earlier"],
            "history": [place(item) for item in each["history"]],
            "candidates": [place(item) for item in each["candidates"]],
            "target": place(each["target"]),
            "ranks": {
                name: [item["ranks"][name] for item in each["candidates"]] for name in each["answers"] if name != ORACLE
            },
            "answers": {
                name: {field: answer[field] for field in ("status", "reasoning", "statements")}
                for name, answer in each["answers"].items()
                if answer["reasoning"]
            },
        }
        for each in lists
    ]
    methods = list(dict.fromkeys(name for user in users for name in user["ranks"]))
    return {"methods": methods, "items": items, "users": users}


def to_html(text: str, first: int = 0) -> tuple[str, list[dict[str, str]]]:
    """Return a Markdown text as HTML, and its headings.

    Headings get ids. A table gets a caption, its heading or the sentence before it, and a box of its own to scroll in.
    The first cell of a line is the heading of the line. HTML in the text is shown as it is written.

    Args:
        text: the text.
        first: number of the headings before, for the ids.

    Returns:
        The HTML, and `id` and `title` of each heading of the second level.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("table_open", _open_table)
    parser.add_render_rule("table_close", _close_table)
    tokens = parser.parse(text)
    headings: list[dict[str, str]] = []
    before = caption = ""
    for place, token in enumerate(tokens):
        if token.type == "heading_open" and token.tag == "h2":
            before = caption = _plain(tokens[place + 1])
            headings.append({"id": f"section-{first + len(headings) + 1}", "title": before})
            token.attrs["id"] = headings[-1]["id"]
        elif token.type == "paragraph_open":
            caption = _plain(tokens[place + 1])
        elif token.type == "table_open":
            token.meta["caption"] = caption if len(caption) < 80 else before
            caption = before
        elif token.type == "th_open":
            token.attrs["scope"] = "col"
        elif token.type == "tr_open" and tokens[place + 1].type == "td_open":
            closing = next(each for each in tokens[place:] if each.type == "td_close")
            tokens[place + 1].tag = closing.tag = "th"
            tokens[place + 1].attrs["scope"] = "row"
    return parser.renderer.render(tokens, parser.options, {}), headings


def _plain(token: Token) -> str:
    """The text of an inline token without its marks."""
    return "".join(child.content for child in token.children or ())


def _open_table(renderer: Any, tokens: Sequence[Token], place: int, options: Any, env: Any) -> str:
    caption = Markup.escape(tokens[place].meta["caption"])
    return (
        f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0">'
        f'<table><caption class="hidden">{caption}</caption>'
    )


def _close_table(renderer: Any, tokens: Sequence[Token], place: int, options: Any, env: Any) -> str:
    return "</table></div>"


def _json(value: Any) -> str:
    """Return JSON that can stand in a script element: no character of it begins or ends an HTML element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return re.sub(r"[<>&\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)
