"""The report's page: what it holds, and that names of a study are text in it."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from ablations.reporting import compose, html, plotting
from ablations.study import schema, store

EVIL = "folder:/a<script>document.title='owned'</script>![x](study.json)[y](javascript:alert(1))<img src=x onerror=y>"


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.titles, self.handlers = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "data")]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "title":
            self.titles.append(data.strip())


@pytest.fixture(scope="module")
def folder(synthetic, tmp_path_factory):
    """Written where a matplotlibrc or a notebook has set what no report is drawn by, which stays as it is."""
    made, rc = synthetic(tmp_path_factory.mktemp("page") / "study"), plotting.pyplot().rcParams
    with plotting.pyplot().rc_context({"text.usetex": True, "savefig.format": "pdf", "axes.formatter.limits": (0, 0)}):
        compose.write([made])
        assert rc["text.usetex"]
        assert rc["axes.spines.top"]
    return made / "report"


def test_the_page_holds_everything(folder):
    text, markdown = (folder / name for name in ("report.html", "report.md"))
    page, told = Page(text.read_text()), markdown.read_text()
    assert page.tags.count("table") == len(re.findall(r"^\| --- ", told, re.M))
    assert page.tags.count("figure") == len(re.findall(r"^!\[", told, re.M)) == 5
    assert page.tags.count("svg") == 4
    assert page.tags.count("img") == 1  # the picture of tokens, once though two arms cut images
    assert page.tags.count("section") == 1
    assert page.tags.count("section") + page.tags.count("details") == len(re.findall("^## ", told, re.M))
    assert all(source.startswith(("data:image/webp;base64,", "#")) for source in page.sources)
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"|http-equiv', "", text.read_text())


@pytest.mark.parametrize("name", ["effects", "pareto", "learning_curves", "kept_bytes"])
def test_figures_are_well_formed_and_tell_their_values(folder, name):
    drawn = ElementTree.parse(folder / "figures" / f"{name}.svg")
    told = [title.text for title in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert (folder / "figures" / f"{name}.png").is_file()
    expected = {
        "effects": r"^mrt: step time \+10\.6 %$",
        "pareto": r"^flash: accuracy \d\d\.\d\d ± \d\.\d\d %, step time, × baseline 0\.9$",
        "learning_curves": r"^mrt, epoch 4: \d\d\.\d\d ± \d\.\d\d %$",
        "kept_bytes": "^flash: qkv mm 4.00 of 4.00 MiB$",
    }
    assert any(re.search(expected[name], text) for text in told), told


def test_names_are_text(synthetic, tmp_path):
    made = synthetic(tmp_path / "study", seeds=1, epochs=1, data=EVIL, timed=False)
    compose.write([made])
    text = (made / "report" / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("script") == 1
    assert "a" not in page.tags
    assert not page.handlers
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert any("<script>document.title" in title for title in page.titles)
    assert "&lt;script&gt;" in text


@pytest.mark.parametrize("place_of", ["device", "error", "folder", "damage", "setting"])
def test_whatever_comes_from_outside_is_text(synthetic, tmp_path, place_of):
    """A shared study, or one in a folder of such a name, runs nothing."""
    evil = "<script>alert(1)</script><img src=x onerror=y>[a](javascript:b)"
    made = synthetic(tmp_path / (evil.replace("/", "") if place_of in ("folder", "damage") else "s"), seeds=1, epochs=1)
    about = schema.read(made / "study.json", schema.StudyFile)
    if place_of == "device":
        about["environment"]["device_name"] = evil
    elif place_of == "setting":
        about["configuration"] |= {"schedule": evil, evil: evil}
    elif place_of == "error":
        failed = store.cell_folder(made, "decatt", 0)
        failed.mkdir(parents=True)
        store.write_json(failed / "failed.json", {"arm": "decatt", "seed": 0, "error": f"{evil}\n<svg onload=z>"})
    elif place_of == "damage":
        (made / "timing.json").write_text("{")
    store.write_json(made / "study.json", about)
    compose.write([made])
    page = Page((made / "report" / "report.html").read_text())
    assert page.tags.count("script") == 1
    assert not {"a", "iframe", "object", "form"} & set(page.tags)
    assert not page.handlers
    assert all(source.startswith(("data:", "#")) for source in page.sources)


@pytest.mark.parametrize("place", ["../study.json", "/etc/hostname", "figures/../../study.json", "none.png"])
def test_pictures_come_from_the_figures_alone(tmp_path, place):
    (tmp_path / "figures").mkdir()
    assert "<img" not in html.render(f"# a\n\n![b]({place})\n", tmp_path)
    assert "<figure" not in html.render(f"# a\n\n![b]({place})\n", tmp_path)


def test_what_a_mark_tells_is_text(tmp_path):
    """Values told under the pointer are attributes first, then text."""
    with plotting.plain():
        figure, axis = plotting.pyplot().subplots()
        (mark,) = axis.plot(1, 1, "o")
        plotting.tell(mark, "\"'></g><script>alert(1)</script>&")
        axis.set_title("<script>")
        plotting.save(figure, tmp_path / "a.png")
    drawn = ElementTree.parse(tmp_path / "a.svg")
    assert "script" not in {element.tag.rpartition("}")[2] for element in drawn.iter()}
    (title,) = drawn.iter("{http://www.w3.org/2000/svg}title")
    assert title.text == "\"'></g><script>alert(1)</script>&"
