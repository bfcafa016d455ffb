"""Run a page in a headless browser, operate its controls, and return what it shows."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

#: Commands of browsers that can be used.
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
SECONDS = 180
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome on this machine")

#: Runs the test's steps once the page is drawn, and replaces the page by their result.
PROBE = """<script>(async () => {
  const drawn = async (count) => {
    for (let tries = 0; Number(document.body.dataset.drawn || 0) < count; tries += 1) {
      if (tries > 2000) throw new Error("nothing was drawn");
      await new Promise((done) => setTimeout(done, 20));
    }
  };
  const choose = async (id, value) => {
    const count = Number(document.body.dataset.drawn) + 1, field = document.getElementById(id);
    field.value = value;
    field.dispatchEvent(new Event("change"));
    await drawn(count);
  };
  const marks = (id) => [...document.querySelectorAll(`#${id} .mark-rect.role-mark path`)].map((path) =>
    ({ fill: path.getAttribute("fill"), ...path.__data__.datum }));
  let result;
  try {
    await drawn(1);
    result = await (async () => { STEPS })();
  } catch (error) {
    result = { failed: String(error) + (document.body.dataset.error || "") };
  }
  document.documentElement.innerHTML = "<body></body>";
  document.body.textContent = `RESULT${JSON.stringify(result)}END`;
})();</script>"""


def use(page: Path, steps: str, *flags: str) -> Any:
    """Open a page and run JavaScript in it, which may use ``choose``, ``drawn`` and ``marks``; returns its result."""
    assert BROWSER is not None
    driven = page.with_name(f"driven-{page.name}")
    text, end, rest = page.read_text(encoding="utf-8").rpartition("</body>")
    driven.write_text(text + PROBE.replace("STEPS", steps) + end + rest, encoding="utf-8")
    words = [BROWSER, "--headless", "--disable-gpu", "--no-first-run", f"--user-data-dir={page.parent / 'profile'}",
             "--virtual-time-budget=60000", "--dump-dom", *flags]  # fmt: skip
    if os.geteuid() == 0:
        words.append("--no-sandbox")
    done = subprocess.run([*words, driven.as_uri()], capture_output=True, text=True, timeout=SECONDS, check=False)
    found = re.search(r"RESULT(.*)END", done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    result = json.loads(html.unescape(found[1]))
    assert "failed" not in result, result
    return result
