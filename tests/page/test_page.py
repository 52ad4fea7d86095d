"""The page over HTTP: a server of two workers with tokens, whose supervisor relays to them."""

from __future__ import annotations

import http.client
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pytest

import timernn
from instruments.processes import ServiceProcess, wait_until
from service.page.logins import COOKIE
from service.security.roles import Role
from service.security.tokens import PREFIX, create_token, revoke_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
CONTENT = np.ones((1, 2, 3), np.float32)


@dataclass
class Answer:
    """An answer of the metrics port."""

    status: int
    headers: http.client.HTTPMessage
    text: str

    @property
    def json(self) -> Any:
        """What it says."""
        return json.loads(self.text)


@dataclass
class Port:
    """A server's metrics port, and a token of each kind."""

    process: ServiceProcess
    address: str
    tokens: dict[str, str]
    file: Path
    cookies: dict[str, str] = field(default_factory=dict)

    def ask(
        self,
        path: str,
        *,
        method: str = "GET",
        body: object = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """Send a request; a body goes as JSON."""
        connection = http.client.HTTPConnection(self.address, timeout=30)
        try:
            given = {"Content-Type": "application/json"} if body is not None else {}
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {**given, **(headers or {})})
            found = connection.getresponse()
            return Answer(found.status, found.headers, found.read().decode())
        finally:
            connection.close()

    def as_bearer(self, who: str, path: str) -> Answer:
        """Ask as programs do."""
        return self.ask(path, headers={"Authorization": f"Bearer {self.tokens[who]}"})

    def log_in(self, token: str) -> Answer:
        """Log in as the page does."""
        return self.ask("/api/login", method="POST", body={"token": token})

    def cookie_of(self, who: str) -> str:
        """Log in, and return what the browser sends from then on."""
        return self.log_in(self.tokens[who]).headers["Set-Cookie"].partition(";")[0]

    def log_out(self, cookie: str) -> Answer:
        """Log out as the page does."""
        return self.ask("/api/logout", method="POST", body={}, headers={"Cookie": cookie})

    def statuses(self, cookie: str) -> set[int]:
        """Ask so often that both workers were asked, but for one time in 128."""
        return {self.ask("/api/now", headers={"Cookie": cookie}).status for _ in range(8)}

    def as_page(self, who: str, path: str) -> Answer:
        """Ask with the cookie of a login."""
        if who not in self.cookies:
            self.cookies[who] = self.cookie_of(who)
        return self.ask(path, headers={"Cookie": self.cookies[who]})

    def connect(self, who: str) -> timernn.Client:
        """Connect a client of the library."""
        return timernn.connect(self.process.address, token=self.tokens[who])


@pytest.fixture(scope="module")
def port(store_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Port]:
    """Run the server, with a model and a session of tenant acme."""
    file = tmp_path_factory.mktemp("page") / "tokens.toml"
    tokens = {}
    for name, role, tenant in (
        ("admin", Role.ADMIN, "page-acme"),
        ("infer", Role.INFER, "page-acme"),
        ("stranger", Role.ADMIN, "page-other"),
        ("operator", Role.OPERATOR, "page-ops"),
    ):
        tokens[name], _ = create_token(file, role, tenant, name=name, expires=None)
    options = ["--tokens", str(file), "--workers", "2", "--metrics-listen", "127.0.0.1:0"]
    with ServiceProcess(store_url, *options) as process:
        url = process.wait_for_line(r".*metrics on (http://\S+)")[1]
        found = Port(process, urlsplit(url).netloc, tokens, file)
        with found.connect("admin") as client:
            client.create_model("quotes", input_size=3, hidden_size=4)
            session = client.session("quotes", session_id="page-session", train=True)
            for _ in range(2):
                session.backward(session.forward(CONTENT))
            session.update()
            yield found


def test_a_login_sets_a_cookie_that_no_script_and_no_other_site_gets(port: Port) -> None:
    """It holds neither the token nor anything of it, and the body does not either."""
    answer = port.log_in(port.tokens["infer"])
    assert answer.status == 200
    cookie = answer.headers["Set-Cookie"]
    assert cookie.startswith(f"{COOKIE}=")
    assert {"HttpOnly", "SameSite=Strict", "Path=/api"} <= set(re.split("; ?", cookie))
    secret = port.tokens["infer"].removeprefix(PREFIX).partition("_")[2]
    assert secret not in cookie + answer.text
    assert answer.json["tenant"] == "page-acme"


def test_a_login_counts_on_each_worker(port: Port) -> None:
    """Whichever of them made the cookie and whichever is asked."""
    assert {port.as_page("infer", "/api/now").status for _ in range(12)} == {200}


@pytest.mark.parametrize("token", ["wrong", "tnn_0000000000000000_wrong", "é", "x" * 9000])
def test_a_wrong_token_is_one_answer(port: Port, token: str) -> None:
    """Whatever is wrong with it; no cookie comes with it."""
    answer = port.log_in(token)
    assert answer.status == 401
    assert answer.json["error"] == {
        "reason": "BAD_CREDENTIALS",
        "message": "the credential is not valid, or not valid any more",
    }
    assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize("path", ["/api/now", "/api/models", "/api/sessions"])
def test_without_a_login_there_is_nothing(port: Port, path: str) -> None:
    """No header, and no token in a URL: that is never looked at."""
    for asked in (path, f"{path}?token={port.tokens['admin']}"):
        assert port.ask(asked).json == {
            "error": {"reason": "NO_CREDENTIALS", "message": "a token is needed"}
        }


@pytest.mark.parametrize(
    "body", [b"token=x", b"{", b"[]", b'{"token": 5}', b'{"token": " "}', b"\xff"]
)
def test_a_login_is_an_object_of_json(port: Port, body: bytes) -> None:
    """What another site's form can send is none."""
    connection = http.client.HTTPConnection(port.address, timeout=30)
    kind = "application/x-www-form-urlencoded" if body == b"token=x" else "application/json"
    connection.request("POST", "/api/login", body, {"Content-Type": kind})
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["error"]["reason"]) == (400, "BAD_FIELD")
    connection.close()


@pytest.mark.parametrize(
    "path", ["/", "/page.js", "/uPlot.js", "/page.css", "/icon.svg", "/api/now"]
)
def test_nothing_is_loaded_from_elsewhere_and_nothing_inline(port: Port, path: str) -> None:
    """Every answer says so to the browser."""
    answer = port.ask(path)
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"


def test_the_page_itself_keeps_to_that(port: Port) -> None:
    """No script or style in it, none from another host; every file that it names is served."""
    page = port.ask("/").text
    assert not re.search(r"<script[^>]*>[^<]|<style|\sstyle=|\son\w+=|https?://", page)
    named = set(re.findall(r'(?:src|href)="([^"]+)"', page))
    assert len(named) == 5
    assert {port.ask(f"/{name}").status for name in named} == {200}


def test_who_logs_in_sees_the_tenant_s_models_and_sessions(port: Port) -> None:
    """With version, norm of the last step, age and chunks; of a bearer as of a login."""
    wait_until(
        "the step", lambda: port.as_page("infer", "/api/models").json["models"][0]["gradient_norm"]
    )
    for ask in (port.as_page, port.as_bearer):
        (model,) = ask("infer", "/api/models").json["models"]
        assert (model["model_id"], model["version"]) == ("quotes", 2)
        assert model["gradient_norm"] > 0
        (session,) = ask("infer", "/api/sessions?model=quotes").json["sessions"]
        assert (session["session_id"], session["chunks"]) == ("page-session", 2)
        assert 0 <= session["idle_ms"] <= session["age_ms"] < 600_000
        assert ask("infer", "/api/sessions?model=another").json["sessions"] == []
        assert ask("infer", "/api/now").json["sessions"] == 1


def test_the_shape_is_the_documented_one(port: Port) -> None:
    """Field by field: docs/operations.md has a row for each."""
    wait_until("both beats", lambda: len(own_replicas(port)) == 2)
    answers = {
        "now": port.as_page("operator", "/api/now").json,
        "figures": port.as_page("operator", "/api/now").json["figures"],
        "replica": own_replicas(port)[0],
        "model": port.as_page("infer", "/api/models").json["models"][0],
        "session": port.as_page("infer", "/api/sessions").json["sessions"][0],
    }
    _, page = (ROOT / "docs" / "operations.md").read_text().split("### The JSON")
    for name, found in answers.items():
        row = re.search(rf"^\| `{name}` \| (.*) \|$", page, re.MULTILINE)
        assert row, name
        assert re.findall(r"`(\w+)`", row[1]) == list(found), name


def own_replicas(port: Port) -> list[Any]:
    """Return the replicas of this server: other tests' servers may be on the same store."""
    log = port.as_page("operator", "/api/now").json["replicas"]
    return [one for one in log if one["is_known"] and one["worker"]]


def test_figures_of_the_whole_server_are_for_admins_and_operators(port: Port) -> None:
    """They count other tenants' work as well; the same may read /metrics."""
    for who in ("admin", "operator"):
        answer = port.as_page(who, "/api/now").json
        assert answer["figures"]["chunks_per_s"] >= 0
        assert answer["replicas"] is not None
    answer = port.as_page("infer", "/api/now").json
    assert (answer["figures"], answer["replicas"]) == (None, None)


def test_one_tenant_sees_nothing_of_another(port: Port) -> None:
    """Neither a name nor a number; a query that names another tenant is refused, whether there is one or not."""
    for path in ("models", "sessions", "now"):
        answer = port.as_page("stranger", f"/api/{path}")
        assert answer.status == 200
        assert "page-acme" not in answer.text
        assert "quotes" not in answer.text
        assert answer.json["tenant"] == "page-other"
        refusals = [
            port.as_page("stranger", f"/api/{path}?tenant={name}") for name in ("page-acme", "none")
        ]
        assert [refusal.status for refusal in refusals] == [403, 403]
        assert refusals[0].text == refusals[1].text
    assert port.as_page("stranger", "/api/now").json["sessions"] == 0


def test_an_operator_chooses_among_all_tenants(port: Port) -> None:
    """And sees each as its own people do."""
    now = port.as_page("operator", "/api/now?tenant=page-acme").json
    assert {"page-acme", "page-other", "page-ops", "default"} <= set(now["tenants"])
    assert (now["tenant"], now["sessions"]) == ("page-acme", 1)
    (model,) = port.as_page("operator", "/api/models?tenant=page-acme").json["models"]
    assert model["model_id"] == "quotes"
    assert port.as_page("operator", "/api/models").json["models"] == []
    assert port.as_page("operator", "/api/now?tenant=no%20name").status == 400


def test_a_page_token_of_nobody_is_refused(port: Port) -> None:
    """As by the RPC."""
    answer = port.as_page("infer", "/api/sessions?page_token=x")
    assert (answer.status, answer.json["error"]["reason"]) == (400, "BAD_FIELD")


def test_nothing_can_be_changed(port: Port) -> None:
    """There is no other method for any path."""
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        for path in ("/", "/api/now", "/api/models", "/api/sessions", "/metrics"):
            assert port.ask(path, method=method).status == 405


def test_a_name_that_leads_to_this_machine_is_not_this_machine(port: Port) -> None:
    """A page of another site that resolves to 127.0.0.1 reads nothing."""
    for path in ("/", "/api/now", "/metrics"):
        assert port.ask(path, headers={"Host": "rebound.example"}).status == 421
        assert port.ask(path, headers={"Host": "localhost"}).status in {200, 401}


def test_logging_out_takes_the_cookie_away(port: Port) -> None:
    """The browser drops it."""
    answer = port.ask("/api/logout", method="POST", body={})
    assert answer.status == 200
    assert f'{COOKIE}=""' in answer.headers["Set-Cookie"]
    assert "Max-Age=0" in answer.headers["Set-Cookie"]


def test_a_copy_of_a_cookie_ends_with_the_login(port: Port) -> None:
    """Whichever worker is asked; a login after that counts, and the end of an ended one does not end it."""
    first, later = port.cookie_of("stranger"), port.cookie_of("stranger")
    assert port.statuses(first) == port.statuses(later) == {200}
    assert port.log_out(first).status == 200
    assert port.statuses(first) == port.statuses(later) == {401}
    again = port.cookie_of("stranger")
    assert port.log_out(first).status == 200
    assert port.statuses(again) == {200}
    assert port.statuses(port.cookie_of("infer")) == {200}


def test_a_revoked_token_ends_its_logins(port: Port) -> None:
    """At the next question after the file was read again."""
    port.tokens["leaver"], _ = create_token(
        port.file, Role.INFER, "page-acme", name="leaver", expires=None
    )
    token = port.tokens["leaver"]
    # Eight questions come to both workers, but for one time in 128.
    wait_until("the token", lambda: {port.log_in(token).status for _ in range(8)} == {200})
    assert port.as_page("leaver", "/api/now").status == 200
    revoke_tokens(port.file, name="leaver")
    wait_until(
        "its end", lambda: {port.as_page("leaver", "/api/now").status for _ in range(8)} == {401}
    )
    assert port.as_page("leaver", "/api/now").json["error"]["reason"] == "BAD_CREDENTIALS"


def test_no_token_is_in_the_log(port: Port) -> None:
    """Nor in what the page was answered."""
    secrets = [token.removeprefix(PREFIX).partition("_")[2] for token in port.tokens.values()]
    assert not [secret for secret in secrets if secret in port.process.log]
