"""The page in a real browser: headless Chromium, driven over WebDriver.

`make operate` installs Chromium and selenium; `make test` skips this in one line without them.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pytest

import timernn
from instruments.processes import ServiceProcess, wait_until
from service.security.roles import Role
from service.security.tokens import PREFIX, create_token

if TYPE_CHECKING:
    from collections.abc import Iterator

webdriver: Any = pytest.importorskip("selenium.webdriver", reason="selenium: make operate")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (BROWSER and DRIVER):
    pytest.skip("chromium and chromedriver: make operate", allow_module_level=True)

CONTENT = np.ones((1, 2, 3), np.float32)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1360,1650", "--hide-scrollbars",
)  # fmt: skip


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Start a browser without a history."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield started
    finally:
        started.quit()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A file of tokens with one of each kind."""
    file = tmp_path_factory.mktemp("browser") / "tokens.toml"
    found = {"file": str(file)}
    for name, role, tenant in (
        ("admin", Role.ADMIN, "seen"),
        ("infer", Role.INFER, "seen"),
        ("operator", Role.OPERATOR, "ops"),
    ):
        found[name], _ = create_token(file, role, tenant, name=name, expires=None)
    return found


@pytest.fixture(scope="module")
def server(store_url: str, tokens: dict[str, str]) -> Iterator[ServiceProcess]:
    """Run a server with tokens and the page."""
    options = ["--tokens", tokens["file"], "--metrics-listen", "127.0.0.1:0"]
    with ServiceProcess(store_url, *options) as process:
        yield process


@pytest.fixture(scope="module")
def session(server: ServiceProcess, tokens: dict[str, str]) -> Iterator[timernn.Session]:
    """Open a session of a model."""
    with timernn.connect(server.address, token=tokens["admin"]) as client:
        client.create_model("quotes", input_size=3, hidden_size=4)
        yield client.session("quotes", session_id="in-the-browser", train=True)


def open_page(browser: Any, server: ServiceProcess) -> str:
    """Open the page; return its address."""
    url = urlsplit(server.wait_for_line(r".*metrics on (http://\S+)")[1])
    browser.get(f"{url.scheme}://{url.netloc}/")
    return str(url.netloc)


def log_in(browser: Any, token: str) -> None:
    """Give a token to the page, once it asks for one."""
    wait_until("the form", lambda: browser.find_element("id", "login").is_displayed())
    field = browser.find_element("id", "token")
    field.clear()
    field.send_keys(token)
    browser.find_element("css selector", "#login-form button").click()


def text_of(browser: Any, selector: str) -> str:
    """Return what an element shows."""
    return str(browser.find_element("css selector", selector).text)


def errors_of(browser: Any) -> list[str]:
    """Return what the console has of errors; a browser reports refused requests there too."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_the_page_shows_the_session_that_is_opened(
    browser: Any, server: ServiceProcess, tokens: dict[str, str], session: timernn.Session
) -> None:
    """With its chunks, the model's step and charts; nothing on the console, nothing from elsewhere."""
    address = open_page(browser, server)
    log_in(browser, tokens["admin"])
    wait_until("the session", lambda: "in-the-browser" in text_of(browser, "#sessions"))
    browser.get_log("browser")  # that there was no login yet
    session.backward(session.forward(CONTENT))
    session.update()
    wait_until(
        "the chunk", lambda: "quotes\n1\n" in text_of(browser, "#sessions").replace(" ", "\n")
    )
    wait_until("the step", lambda: "ago" in text_of(browser, "#models"))
    assert len(browser.find_elements("css selector", "#charts canvas")) == 4
    assert "serving" in text_of(browser, "#replicas")
    assert text_of(browser, "#state") == "live"
    assert errors_of(browser) == []
    asked = browser.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
    )
    assert {urlsplit(url).netloc for url in asked} == {address}
    assert not [
        url for url in asked if tokens["admin"].removeprefix(PREFIX).partition("_")[2] in url
    ]
    assert browser.execute_script("return document.cookie") == ""
    if folder := os.environ.get("PAGE_SCREENSHOTS"):
        browser.save_screenshot(Path(folder) / "page.png")


def test_a_model_narrows_the_sessions_and_a_logout_ends_it(
    browser: Any, server: ServiceProcess, tokens: dict[str, str], session: timernn.Session
) -> None:
    """By a click on each; then the page asks for a token, and again after a reload."""
    open_page(browser, server)
    log_in(browser, tokens["infer"])
    wait_until("the model", lambda: "quotes" in text_of(browser, "#models"))
    assert not browser.find_element("id", "charts").is_displayed()
    assert "admin or operator" in text_of(browser, "#no-figures")
    browser.find_element("css selector", "#models button").click()
    wait_until("its sessions", lambda: "Sessions of quotes" in text_of(browser, "#sessions-title"))
    assert session.session_id in text_of(browser, "#sessions")
    browser.find_element("id", "logout").click()
    wait_until("the form", lambda: browser.find_element("id", "login").is_displayed())
    browser.refresh()
    wait_until("the form", lambda: browser.find_element("id", "login").is_displayed())


def test_a_wrong_token_is_refused_in_words(browser: Any, server: ServiceProcess) -> None:
    """The form stays, and says why."""
    open_page(browser, server)
    log_in(browser, "wrong")
    wait_until("the refusal", lambda: "not valid" in text_of(browser, "#login-error"))
    assert browser.find_element("id", "login").is_displayed()


def test_an_operator_chooses_a_tenant(
    browser: Any, server: ServiceProcess, tokens: dict[str, str], session: timernn.Session
) -> None:
    """And sees what that one has; before that, an empty list says that it is one."""
    open_page(browser, server)
    log_in(browser, tokens["operator"])
    wait_until("the list", lambda: "no models yet" in text_of(browser, "#models"))
    choice = browser.find_element("css selector", "#tenant option[value=seen]")
    choice.click()
    wait_until("the tenant", lambda: session.session_id in text_of(browser, "#sessions"))
