"""The site forgets nothing: every public name, scheme and page has its place, and links resolve."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import tnlm
from tnlm.decompositions import formats
from tnlm.schemes import schemes

DOCS = Path(__file__).parents[1] / "docs"
WRITTEN = [page for page in DOCS.rglob("*.md") if not {"_build", "_generated"} & set(page.parts)]


@pytest.fixture(scope="module")
def site():
    """Import what makes the pages, as conf.py does."""
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(DOCS))
    try:
        import diagrams
        import pages

        yield pages, diagrams
    finally:
        sys.path.remove(str(DOCS))
        for name in ("pages", "costs", "diagrams", "measured", "papers", "sizes", "sources"):
            sys.modules.pop(name, None)


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "api" / "index.md").read_text()
    found = re.findall(r"^\.\. auto(?:function|class):: (\w+)$", text, re.M)
    assert sorted(found) == sorted(tnlm.__all__)


def test_every_picture_function_is_in_the_reference(site):
    pages, _ = site
    listed = re.findall(r"^\.\. autofunction:: tnlm\.plot\.(\w+)$", _api(), re.M)
    assert listed == pages.public_names("tnlm.studies.plot")


def test_every_package_has_a_page_of_its_own(site):
    pages, _ = site
    folder = Path(tnlm.__file__).parent
    found = folder.glob("*/**/__init__.py")
    names = (".".join(path.parent.relative_to(folder.parent).parts) for path in found)
    assert set(pages.PACKAGES) == set(names)


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("tnlm.studies.analysis", "kronecker_errors"),
        ("tnlm.evaluation", "decode_rates"),
        ("tnlm.recovery.pruning", "movement_prune"),
        ("tnlm.recovery", "retruncate"),
        ("tnlm.decompositions", "LowRank"),
    ],
)
def test_a_package_page_lists_what_its_modules_define(package, name, site):
    pages, _ = site
    assert re.search(rf":members: .*\b{name}\b", pages.api_page(package, "title"))


@pytest.mark.parametrize("name", schemes())
def test_every_scheme_has_a_page_with_its_choices(name, site):
    pages, _ = site
    scheme = schemes()[name]
    text = pages.scheme_page(scheme)
    assert text.startswith(f"# {name}\n")
    for word in (*scheme.formats, scheme.metric, scheme.allocation, scheme.needs, scheme.source):
        assert word in text
    assert f"schemes/{name}.md)" in pages.scheme_table(schemes())
    [call] = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    compile(call, name, "exec")
    assert (DOCS / "schemes" / f"{name}.md").is_file(), "its formula, and when to use it"
    assert not re.search(r"^## .*\s*(^## |\Z)", text, re.M), "a section is empty"


def test_a_scheme_page_has_what_was_measured(site):
    pages, _ = site
    page = pages.scheme_page(schemes()["svd"])
    assert "## Measured" in page
    assert re.search(r"^\| 0\.\d+ \| 0\.\d+ \| [\d.,]+ \| [\d.,]+ \| \d+ \|$", page, re.M)
    assert "on SST-2 with a third of its rank" in page


def test_the_home_page_says_what_auto_costs(site):
    said = sys.modules["measured"].headline()
    assert re.match(r"\*\*Perplexity × 1\.\d\d at 0\.8 of the linear weights", said)
    assert "_generated/headline.md" in (DOCS / "index.md").read_text()


def test_measured_rows_stand_in_the_order_of_their_size(site):
    pages, _ = site
    page = pages.scheme_page(schemes()["auto"])
    kept = re.findall(r"^\| (0\.\d+) \| 0\.\d+ \|", page, re.M)
    assert kept == sorted(kept, reverse=True)
    assert len(kept) > 2


def test_prose_belongs_to_schemes_that_exist():
    assert {page.stem for page in (DOCS / "schemes").glob("*.md")} <= set(schemes())


@pytest.mark.parametrize(
    ("text", "links"),
    [
        (
            "K-FAC, as OBD-LLM (arXiv 2604.00821) and (arXiv:2605.15626)",
            ["2604.00821", "2605.15626"],
        ),
        ("as in AWQ (arXiv\n2306.00978)", ["2306.00978"]),
        ("arXiv is a library; 2306.00978 tokens", []),
    ],
)
def test_papers_on_arxiv_are_links(text, links, site):
    import papers
    from docutils import nodes

    found = [node for node in papers.linked(text) if isinstance(node, nodes.reference)]
    assert [node["refuri"] for node in found] == [f"https://arxiv.org/abs/{n}" for n in links]


def test_papers_in_code_and_in_links_stay_as_they_are(site):
    import papers
    from docutils import nodes
    from docutils.utils import new_document

    page = new_document("page")
    told = "arXiv 2306.00978"
    page += nodes.paragraph(
        "", "", nodes.literal("", told), nodes.reference("", told), nodes.Text(told)
    )
    papers.link_papers(None, page)
    assert len(list(page.findall(nodes.reference))) == 2
    assert page.astext() == 3 * told


def test_pictures_are_of_formats_that_exist_and_stand_on_the_page(site):
    _, diagrams = site
    page = (DOCS / "concepts" / "networks.md").read_text()
    assert {form for form, _, _ in diagrams.EXAMPLES.values()} <= set(formats())
    assert all(f"/_generated/diagrams/{name}.svg" in page for name in diagrams.EXAMPLES)


def test_a_picture_is_drawn_from_the_equation(site):
    _, diagrams = site
    for name in diagrams.EXAMPLES:
        network = diagrams.example(name)
        drawn = [text.get_text() for text in diagrams.draw(network).axes[0].texts]
        modes = dict.fromkeys("".join(network.factors.values()))
        assert sorted(drawn) == sorted(
            [*network.factors, *(f"{mode} = {network.sizes[mode]:,}" for mode in modes)]
        )


def test_pictures_are_the_same_every_time(site, tmp_path):
    _, diagrams = site
    for folder in ("one", "two"):
        diagrams.write_all(tmp_path / folder)
    for first in (tmp_path / "one").iterdir():
        assert first.read_bytes() == (tmp_path / "two" / first.name).read_bytes()


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_within_the_site_lead_somewhere(page, site):
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        target = DOCS / link[1:] if link.startswith("/") else page.parent / link
        generated = re.fullmatch(r"/_generated/schemes/([\w-]+)\.md", link)
        built = generated[1] in schemes() if generated else link == "/_generated/examples.md"
        assert built or target.is_file(), link


def test_every_page_is_reached():
    listed = set()
    for page in WRITTEN:
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.S):
            entries = [line for line in block.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / f"{entry}.md").resolve() for entry in entries}
    parts = DOCS / "schemes"  # included by generated pages
    alone = {p.resolve() for p in WRITTEN if p.parent != parts} - listed
    assert alone == {(DOCS / "index.md").resolve()}


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("tnlm.api.compress", "tnlm.compress"),
        ("tnlm.studies.analysis.result.Analysis.damage", "tnlm.Analysis.damage"),
        ("tnlm.RankError", "tnlm.errors.RankError"),
        ("tnlm.studies.plot.energy", "tnlm.plot.energy"),
        ("tnlm.unknown", "tnlm.unknown"),
    ],
)
def test_source_pages_link_back_to_public_names(name, right, site):
    import sources

    known = ["tnlm.compress", "tnlm.Analysis.damage", "tnlm.errors.RankError", "tnlm.plot.energy"]
    assert sources.right_name(name, known) == right


def _api() -> str:
    return (DOCS / "api" / "index.md").read_text()


def test_formulas_are_mathml_which_needs_no_script(monkeypatch):
    pytest.importorskip("latex2mathml")
    nodes = pytest.importorskip("docutils.nodes")
    monkeypatch.syspath_prepend(str(DOCS))
    import mathml

    written = SimpleNamespace(body=[])
    with pytest.raises(nodes.SkipNode):
        mathml.inline(written, nodes.math("", "C^{1/2}"))
    with pytest.raises(nodes.SkipNode):
        mathml.block(written, nodes.math_block("", r"\sum_i x_i", ids=["sum"]))
    assert written.body[0].startswith("<math")
    assert 'id="sum"' in written.body[1]
    assert 'display="block"' in written.body[1]
