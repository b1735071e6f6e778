"A real JupyterLab and a real Chromium, for the tests and the benchmark of the explorer."

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "nbs" / "explore" / "tier_mixes.ipynb"
NO_NEWS = '{"fetchNews": "false", "checkForUpdates": false, "doNotDisturbMode": true}'
CHROMIUM_ARGS = ["--no-sandbox", "--disable-background-networking"]


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def missing() -> str | None:
    "Why no browser can be used; None when one can."
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "Playwright is not installed: pip install playwright"
    return None if chromium() else "no Chromium on the path: apt-get install chromium"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def lab_environment(home: Path, buckets: Path) -> dict[str, str]:
    "Settings, history and runtime files below `home`; nothing of the user is read or written."
    folders = (
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_RUNTIME_DIR",
        "JUPYTERLAB_SETTINGS_DIR",
        "JUPYTERLAB_WORKSPACES_DIR",
        "IPYTHONDIR",
    )
    settings = home / "JUPYTERLAB_SETTINGS_DIR" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(NO_NEWS)
    own = {name: str(home / name) for name in folders}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return (
        os.environ
        | own
        | {"ELSON_BUCKETS": str(buckets), "PYTHONPATH": path, "JUPYTER_TOKEN": secrets.token_hex(16)}
    )


@contextmanager
def jupyter_lab(work: Path, buckets: Path) -> Iterator[str]:
    "A server on a copy of the notebook in `work`/notebooks; yields the address of the notebook."
    notebooks = work / "notebooks"
    notebooks.mkdir(parents=True)
    shutil.copy(NOTEBOOK, notebooks)
    port, env = free_port(), lab_environment(work / "home", buckets)
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--ServerApp.port_retries=0",
    ]
    with open(work / "lab.log", "w") as log:
        server = subprocess.Popen(
            [*command, f"--notebook-dir={notebooks}"], env=env, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until_up(f"http://127.0.0.1:{port}/api", server, work / "lab.log")
        yield f"http://127.0.0.1:{port}/doc/tree/{NOTEBOOK.name}?token={env['JUPYTER_TOKEN']}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def wait_until_up(address: str, server: subprocess.Popen, log: Path, seconds: float = 40) -> None:
    begun = time.monotonic()
    while time.monotonic() < begun + seconds and server.poll() is None:
        try:
            return urllib.request.urlopen(address, timeout=2).close()
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not come up:\n{log.read_text()[-2000:]}")


@contextmanager
def browser_page(width: int = 1400, height: int = 1000, scale: float = 1) -> Iterator:
    "A page of a headless Chromium."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=CHROMIUM_ARGS)
        try:
            context = browser.new_context(
                viewport={"width": width, "height": height}, device_scale_factor=scale
            )
            context.grant_permissions(["clipboard-read", "clipboard-write"])
            yield context.new_page()
        finally:
            browser.close()


def open_explorer(page, address: str, seconds: float = 60) -> None:
    "Open the notebook, run all its cells and wait for the figure and the records."
    page.set_default_timeout(seconds * 1000)
    page.goto(address)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # before that, "run all" runs nothing
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(".elson-page img.widget-image").wait_for()
    page.locator(".elson-page table.dataTable tbody tr").nth(1).wait_for()
