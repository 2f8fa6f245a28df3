"""The page of scripts/view.py in a browser: it draws each of its views, by clicks and by keys, runs nothing that a
completion brings, and has nothing to say on its console."""

import threading
import time

import pytest

from gspo.report.view.pack import packed
from gspo.report.view.page import page
from gspo.report.view.serve import make_server
from tests.browser import CHROMIUM, Browser
from tests.token_records import HOSTILE, write_metrics, write_record

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no `chromium` to open the page with")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Two runs on the same prompts; the completions of one are hostile."""
    folder = tmp_path_factory.mktemp("view")
    prompts = [*HOSTILE[:5], "plain"]
    for name, shift in (("gspo", 0.0), ("grpo", 0.1)):
        write_metrics(folder / name, shift=shift)
        for rollout in (0, 5):
            texts = HOSTILE if rollout else ["one", "two"]
            write_record(
                folder / name, rollout, texts=texts if name == "gspo" else texts[:1], groups=6, prompts=prompts
            )
    (folder / "view.html").write_text(page(packed([folder / "gspo", folder / "grpo"], 10**6)), encoding="utf-8")
    return f"file://{folder / 'view.html'}"


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(started, url):
    started.errors.clear()
    started.open(url)
    yield started
    assert started.errors == []
    assert started.value("document.title") == "Runs, token by token"  # hostile texts would have changed it


def tab(browser, name):
    browser.click(f"#tab-{name}")
    assert browser.value(f"document.querySelector('#tab-{name}').ariaSelected") == "true"


def test_the_runs_are_drawn_as_curves_that_arrows_read(browser):
    # Catches a figure without its lines, and one that only a mouse can read.
    assert browser.value("document.querySelectorAll('figure polyline').length") >= 6
    browser.value("document.querySelector('figure svg').focus()")
    browser.press("ArrowLeft")
    assert browser.text("figure .read").startswith("6: gspo 0.6")
    browser.choose("more", "grad_norm/max")
    assert "grad_norm/max" in browser.text("figure")


def test_the_rollout_is_sorted_filtered_and_opened(browser):
    # Catches a sort by the text of a number, a filter that hides the wrong rows, a button that opens another row.
    tab(browser, "rollout")
    browser.choose("record", "1")
    rewards = "[...document.querySelectorAll('tbody tr')].map((r) => Number(r.cells[5].textContent))"
    browser.click("[data-key=rows-sort-5]")
    browser.click("[data-key=rows-sort-5]")
    found = browser.value(rewards)
    assert len(found) == 12 and found in (sorted(found), sorted(found, reverse=True))
    assert browser.value("document.activeElement.dataset.key") == "rows-sort-5"
    browser.choose("search", "arabic-free")
    assert "0 of 12 completions" in browser.text("caption")
    browser.choose("search", "ONERROR")
    assert "2 of 12" in browser.text("caption")  # the first prompt has it too
    browser.choose("search", "")
    browser.choose("clipped", "yes")
    clipped = int(browser.text("caption").split()[0])
    browser.choose("clipped", "no")
    assert 0 < clipped < 12 and int(browser.text("caption").split()[0]) == 12 - clipped
    browser.choose("clipped", "any")
    browser.click("[data-key=open-3]")
    assert "Completion, token by token" in browser.text()
    assert browser.value("document.querySelector('[data-key=row]').value") == "3"


def test_tokens_are_read_by_keys_and_coloured_by_what_is_chosen(browser):
    # Catches a card of another token, tokens out of reach of the keyboard, a colour that does not change.
    tab(browser, "completion")
    browser.value("document.querySelector('.tokens button').focus()")
    browser.press("ArrowRight")
    assert browser.text("#card").find("2 of ") > 0
    browser.press("End")
    assert "⟨end⟩" in browser.text("#card h3")
    colours = "[...document.querySelectorAll('.tokens button')].map((b) => b.style.backgroundColor).join()"
    seen = []
    for quantity in ("logW", "contribution", "shift", "weight", "entropy", "layers", "margin"):
        browser.choose("quantity", quantity)
        seen.append(browser.value(colours))
    assert len(set(seen)) >= 6 and all("rgba" in each for each in seen)


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_hostile_completion_is_text(browser, number):
    # Catches markup that is parsed, a script that runs, controls and turned-round text that reach the page.
    browser.choose("run", "0")
    browser.choose("record", "1")
    tab(browser, "completion")
    browser.choose("row", str(number))
    text = browser.value("document.querySelectorAll('div.text')[1].textContent")
    assert not set(text) & set("\x00\x07\x1b\u202e\u202c") and "\ufffd" not in text
    visible = HOSTILE[number].encode("utf-8", "replace").decode()
    for char in "\x00\x07\x1b\u202e\u202c":
        visible = visible.replace(char, f"\\u{{{ord(char):x}}}")
    assert text == visible
    assert browser.value("document.querySelectorAll('#panel img, #panel script').length") == 0
    assert browser.value("document.scripts.length") == 2


def test_the_switch_recounts_what_each_objective_clips(browser):
    # Catches a slider that changes nothing, or that changes the other objectives.
    tab(browser, "objectives")
    cells = "[...document.querySelectorAll('tbody tr')].map((r) => [...r.cells].map((c) => c.textContent).join('|'))"
    before = browser.value(cells)
    assert [line.split("|")[0] for line in before] == ["GRPO", "GSPO", "GSPO-token", "CISPO", "SAPO", "GMPO"]
    browser.choose("objective", "grpo")
    browser.choose("epsilon", "-2")
    browser.choose("epsilon_high", "-2")
    after = browser.value(cells)
    assert after[0] != before[0] and after[1:] == before[1:] and "0.01 / 0.01" in after[0]
    assert browser.value("document.querySelectorAll('.tokens .cut').length") > 0
    browser.click("[data-key=reset]")
    assert browser.value(cells) == before
    browser.choose("objective", "sapo")
    assert browser.value("document.querySelectorAll('input[type=range]').length") == 2


def test_layers_scatters_and_pairs_are_drawn(browser):
    # Catches a view that fails on a record of a MoE, and a first difference that is not the first.
    tab(browser, "layers")
    assert browser.value("document.querySelectorAll('svg .cell').length") > 0 and "By layer" in browser.text()
    tab(browser, "scatter")
    assert browser.value("document.querySelectorAll('svg .dot').length") > 50
    tab(browser, "compare")
    assert "The two completions are the same." in browser.text()
    browser.choose("completion", "1")
    assert "They differ from token" in browser.text()
    assert browser.value("document.querySelectorAll('.tokens .differs').length") == 2
    browser.choose("prompt", browser.value("document.querySelector('[data-key=prompt]').options[5].value"))
    assert "plain" in browser.text("div.text")


def test_tabs_are_reached_by_arrows(browser):
    # Catches tabs that only a mouse can turn.
    browser.value("document.querySelector('#tab-overview').focus()")
    for expected in ("rollout", "completion", "objectives", "layers", "scatter", "compare", "overview"):
        browser.press("ArrowRight")
        assert browser.value("document.activeElement.id") == f"tab-{expected}"


@pytest.mark.parametrize("name", ["overview", "rollout", "completion", "objectives", "layers", "scatter", "compare"])
def test_nothing_is_wider_than_a_phone_and_everything_has_a_name(browser, url, name):
    # Catches a page that is scrolled sideways, and controls that a screen reader calls "button".
    browser.open(url, width=390, height=844, dark=True)
    browser.value(f"turnTo('{name}')")
    assert browser.value("document.documentElement.scrollWidth") <= 390
    unnamed = """[...document.querySelectorAll("button, select, input, svg[role=img]")].filter((e) =>
        !(e.textContent.trim() || e.ariaLabel || (e.labels && e.labels.length))).map((e) => e.outerHTML)"""
    assert browser.value(unnamed) == []
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"


@pytest.mark.slow
def test_a_served_page_takes_over_what_the_run_writes(started, tmp_path):
    # Catches a page that stays as it was, one that loses what its reader had turned to, and a policy that forbids it.
    write_metrics(tmp_path / "run")
    write_record(tmp_path / "run", 0)
    started.errors.clear()
    with make_server([tmp_path / "run"], 10**6) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.open(f"http://127.0.0.1:{server.server_address[1]}/")
        started.value("turnTo('completion')")
        time.sleep(1)
        write_record(tmp_path / "run", 5)
        started.wait("runNow().records.length === 2")
        assert "something new" in started.text("#said") and "token by token" in started.text()
        started.open("about:blank", ready=False)
        server.shutdown()
    assert started.errors == []


@pytest.mark.slow
def test_100_000_tokens_are_there_within_two_seconds(started, tmp_path):
    # Catches work that grows with the square of the tokens, and a table that draws every row at once.
    texts = ["a completion of three hundred characters " * 8] * 300
    write_record(tmp_path / "run", 0, texts=texts[:300], groups=160)
    (tmp_path / "view.html").write_text(page(packed([tmp_path / "run"], 100_000)), encoding="utf-8")
    started.errors.clear()
    begun = time.perf_counter()
    started.open(f"file://{tmp_path / 'view.html'}")
    seconds = time.perf_counter() - begun
    assert started.value("recordNow().token.length") > 95_000
    for name in ("rollout", "completion", "objectives", "scatter"):
        started.value(f"turnTo('{name}')")
    assert started.errors == []
    assert seconds < 2, seconds
