"""The page of scripts/view.py as a file: what is in it, what is left out, and that nothing in it can run but its own
script."""

import base64
import gzip
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from gspo.model.routing import changed
from gspo.report.view import pack
from gspo.report.view.page import SCRIPTS, SOURCES, page, script
from gspo.run import cli, tokens
from gspo.types import UserError
from scripts import view
from tests.token_records import HOSTILE, about, columns_of_rows, write_metrics, write_record


def content_of(packed):
    """(header, {name: array} of a record) of what stands in a page."""
    content = gzip.decompress(base64.b64decode(packed))
    length = int.from_bytes(content[:4], "little")
    header = json.loads(content[4 : 4 + length])

    def arrays(record):
        return {
            name: np.frombuffer(content, pack.DTYPES[at["dtype"]], at["size"], 4 + length + at["at"])
            for name, at in record["arrays"].items()
        }

    return header, arrays


class Seen(HTMLParser):
    """Tags, attributes and the text within scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.scripts, self.inside = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        self.inside = tag == "script"
        self.scripts += [""] * self.inside

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "script"

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


@pytest.fixture
def run(tmp_path):
    write_metrics(tmp_path / "gspo")
    write_record(tmp_path / "gspo", 0, texts=HOSTILE, groups=6, prompts=[*HOSTILE[:5], "plain"])
    return tmp_path / "gspo"


def test_the_page_holds_the_columns_of_the_record(run):
    # Catches columns that lie at another place than the header says, and numbers that are rounded.
    header, arrays = content_of(pack.packed([run], 10**6))
    (only,) = header["runs"]
    (record,) = only["records"]
    got, want = arrays(record), columns_of_rows(0, texts=HOSTILE, groups=6, prompts=[*HOSTILE[:5], "plain"])
    for name in ("row", "group", "update", "reward", "token", "mask", "advantage", "old_logp", "logp", "after_logp"):
        np.testing.assert_array_equal(got[name], want[name].astype(got[name].dtype), err_msg=name)
    np.testing.assert_array_equal(got["start"], np.concatenate([[0], np.cumsum(want["length"])]))
    np.testing.assert_array_equal(got["margin"], want["margin"].min(1))
    routes = (np.moveaxis(want[name], 0, 1)[:, :, None] for name in ("old_routes", "routes"))
    share = np.asarray(changed(*routes))[:, :, 0].T
    np.testing.assert_array_equal(got["changed"].reshape(share.shape), np.round(share * 2))
    assert share.any() and all(at["at"] % 8 == 0 for at in record["arrays"].values())
    assert record["updates"] == {
        "rows": [6, 6],
        "tokens": [int(n) for n in (want["length"][:6].sum(), want["length"][6:].sum())],
    }
    assert [prompt["text"] for prompt in record["prompts"]][5] == "plain" and record["pieces"]["257"] == "⟨end⟩"
    assert record["texts"][1] == HOSTILE[1] and record["pieces"]["240"] == "⟨f0⟩"
    assert only["metrics"]["eval/pass@1"] == [[0, 4], [0.4, 0.4]] and "none" not in only["metrics"]
    assert only["notes"] == []


def test_the_page_is_whole_and_has_the_parts_that_its_script_looks_for(run):
    # Catches a template whose placeholder is left, a file of the script that is not taken in, a page that needs others.
    seen = Seen(page(pack.packed([run], 10**6)))
    assert seen.tags.count("script") == 2 and seen.tags.count("style") == 1
    assert {"header", "nav", "main", "footer", "h1", "noscript"} <= set(seen.tags)
    ids = {value for _, name, value in seen.attributes if name == "id"}
    assert set(re.findall(r'getElementById\("([\w-]+)"\)', script())) <= ids
    assert not [a for a in seen.attributes if a[1] in ("src", "href", "action") and not a[2].startswith("#")]
    assert sorted(SCRIPTS) == sorted(path.name for path in SOURCES.glob("*.js"))
    assert "{{" not in page("") and "http:" not in script().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function", script())


def test_the_policy_allows_the_pages_own_script_and_nothing_else(run):
    # Catches a policy that would run what a completion brings, and one that would not run the page.
    for live in (False, True):
        seen = Seen(page(pack.packed([run], 10**6), live=live))
        (policy,) = [
            v for tag, name, v in seen.attributes if tag == "meta" and name == "content" and "default-src" in v
        ]
        assert "unsafe" not in policy and "default-src 'none'" in policy
        digest = hashlib.sha256(seen.scripts[1].encode()).digest()
        assert f"'sha256-{base64.b64encode(digest).decode()}'" in policy
        assert ("connect-src 'self'" in policy) == live


def test_no_text_of_a_completion_or_a_prompt_stands_in_the_page_as_it_is(run):
    # Catches texts that end the script that holds them, or that a browser would take for markup.
    text = page(pack.packed([run], 10**6))
    assert "onerror" not in text and text.count("</script>") == 2 and "ran" not in Seen(text).scripts[0][:40]
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", Seen(text).scripts[0])


def test_a_cap_keeps_the_last_rollout_then_the_first_and_says_what_it_leaves_out(tmp_path):
    # Catches a cap that cuts a group in two, and one that nobody is told of.
    sizes = {}
    for rollout in (0, 10, 20, 30, 40):
        write_record(tmp_path, rollout)
        sizes[rollout] = int(columns_of_rows(rollout)["length"].sum())

    def shown(limit):
        (run,) = content_of(pack.packed([tmp_path], limit))[0]["runs"]
        return {r["rollout"]: len(r["prompts"]) for r in run["records"]}, run["notes"]

    assert shown(10**6) == (dict.fromkeys(sizes, 3), [])
    found, notes = shown(sizes[40] + sizes[0])
    assert found == {40: 3, 0: 3} and "2 of 5 recorded rollouts are shown" in notes[0]
    found, notes = shown(sizes[40] + sizes[0] - 1)
    assert found == {40: 3, 0: 2} and "of rollout 0 the first 2 of 3 groups are shown" in notes[0] and len(notes) == 2
    found, notes = shown(1)
    assert found == {40: 1} and len(notes) == 2


def test_losses_divide_by_the_whole_minibatch_also_where_a_part_of_it_is_shown(tmp_path):
    # Catches gradient weights that grow when the cap leaves out half of a minibatch.
    write_record(tmp_path, 0, groups=4)
    whole, cut = (content_of(pack.packed([tmp_path], n))[0]["runs"][0]["records"][0] for n in (10**6, 1))
    assert len(cut["prompts"]) == 1 and cut["updates"] == whole["updates"]


def test_a_record_without_its_tokenizer_shows_ids(tmp_path):
    # Catches a page that cannot be made any more once the files of a tokenizer are gone.
    tokens.write(tmp_path, 0, about(0, tokenizer="/gone/tokenizer.json"), columns_of_rows(0))
    (run,) = content_of(pack.packed([tmp_path], 10**6))[0]["runs"]
    assert run["records"][0]["pieces"]["257"] == "⟨257⟩" and run["records"][0]["texts"][0].startswith("⟨")


@pytest.mark.parametrize(("make", "message"), [
    (lambda folder: None, "no such workdir"),
    (lambda folder: folder.mkdir(), "holds no metrics.jsonl and no tokens/"),
    (lambda folder: write_record(folder, 0).write_bytes(b"PK"), "not a whole record of tokens"),
    (lambda folder: (write_metrics(folder) / "metrics.jsonl").write_text("{]\n"), "a line that is not JSON"),
])  # fmt: skip
def test_what_cannot_be_shown_is_one_line(tmp_path, capsys, monkeypatch, make, message):
    # Catches a traceback, and a page that is written all the same.
    make(tmp_path / "run")
    monkeypatch.setattr("sys.argv", ["view.py", str(tmp_path / "run"), f"--out={tmp_path / 'view.html'}"])
    with pytest.raises(SystemExit) as stopped:
        cli.run_script(view.main)
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and message in told and told.count("\n") == 1
    assert not (tmp_path / "view.html").exists()


def test_the_script_writes_the_page(run, tmp_path, capsys):
    # Catches a command that writes elsewhere, and flags that do nothing.
    other = write_metrics(tmp_path / "grpo", shift=0.1)
    assert view.main([str(run), str(other), f"--out={tmp_path / 'view.html'}", "--tokens=2"]) == 0
    assert "view.html" in capsys.readouterr().out
    data = Seen((tmp_path / "view.html").read_text()).scripts[0]
    header, _ = content_of(data)
    assert [run["name"] for run in header["runs"]] == ["gspo", "grpo"] and header["limit"] == 2
    assert "has no record of tokens" in header["runs"][1]["notes"][0]
    with pytest.raises(UserError, match="--tokens=0"):
        view.main([str(run), "--tokens=0"])


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no `node` to check the page's script with")
def test_the_script_has_no_mistake_of_grammar(tmp_path):
    # Catches a page that would show nothing, where there is no browser to try it in.
    (tmp_path / "script.js").write_text(script())
    done = subprocess.run(["node", "--check", tmp_path / "script.js"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
