"""`scripts/view.py --serve`: three paths, this machine alone, nothing else."""

import http.client
import threading

import pytest

from gspo.report.view.serve import make_server
from gspo.types import UserError
from scripts import view
from tests.token_records import write_metrics, write_record


@pytest.fixture
def server(tmp_path):
    write_metrics(tmp_path / "run")
    write_record(tmp_path / "run", 0)
    (tmp_path / "secret.txt").write_text("secret")
    with make_server([tmp_path / "run"], 10**6) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(server, path, method="GET", host=None):
    address, port = server.server_address
    connection = http.client.HTTPConnection(address, port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"{address}:{port}")
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_it_listens_on_the_loopback_address_alone(server):
    # Catches a server that the network can reach.
    assert server.server_address[0] == "127.0.0.1"


def test_the_page_is_served_and_its_data_follow_the_run(server, tmp_path):
    # Catches a page that stays as it was at the start, and a version that does not change when the run writes.
    status, text = ask(server, "/")
    assert status == 200 and 'data-live="yes"' in text and "connect-src 'self'" in text
    version, data = ask(server, "/version"), ask(server, "/data")
    assert (version, data) == (ask(server, "/version"), ask(server, "/data")) and version[0] == data[0] == 200
    write_record(tmp_path / "run", 5)
    assert ask(server, "/version") != version and ask(server, "/data") != data
    write_metrics(tmp_path / "run", rollouts=9)
    assert ask(server, "/version")[1].count(":") == 6


@pytest.mark.parametrize("path", [
    "/config.json", "/metrics.jsonl", "/tokens/000000.0.npz", "/../secret.txt", "/%2e%2e/secret.txt", "//etc/passwd",
    "/data/../../secret.txt", "/data?path=/etc/passwd", "/./data", "",
])  # fmt: skip
def test_no_other_path_is_answered(server, path):
    # Catches a path that becomes the name of a file, in the run or out of it.
    status, text = ask(server, path or "*")
    assert status == 404 and "secret" not in text and "root:" not in text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_it_can_only_be_read(server, method):
    assert ask(server, "/data", method)[0] == 501


def test_who_calls_it_by_another_name_is_refused(server):
    # Catches a page of another site that has its own name resolve to this machine, and reads the run under it.
    port = server.server_address[1]
    assert ask(server, "/data", host=f"evil.example:{port}")[0] == 403
    assert ask(server, "/data", host=f"localhost:{port}")[0] == 200


def test_a_record_that_breaks_later_is_one_line_and_the_server_stays(server, tmp_path):
    # Catches a server that dies, or an empty answer that the page would take for data.
    path = write_record(tmp_path / "run", 5)
    content = path.read_bytes()
    path.write_bytes(content[:50])
    status, text = ask(server, "/data")
    assert status == 503 and "not a whole record" in text and text.count("\n") == 1
    path.write_bytes(content)
    assert ask(server, "/data")[0] == 200


def test_a_port_that_is_taken_and_a_run_that_is_not_there_are_one_line(server, tmp_path):
    with pytest.raises(UserError, match=r"--port=\d+: Address already in use"):
        make_server([tmp_path / "run"], 1, server.server_address[1])
    with pytest.raises(UserError, match="no such workdir"):
        view.main([str(tmp_path / "nowhere"), "--serve"])
