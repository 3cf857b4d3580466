"""The page's files: what is vendored is what its note says, and all of it is in the package."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files

from penstock.gateway.operator.page import TYPES, assets

#: SHA-256 of the files of the npm package, by version.
UPLOT = {
    "1.6.32": {
        "uPlot.esm.js": "5dd9b3281aa64b461b42d9945f6adb2649d346502b12281a9ae0d46599a80eba",
        "uPlot.esm.d.ts": "af44374f6e808be4f7f3fa5888b9c7574dca9f8a15a66d54b6763535802c8080",
        "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
        "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
    }
}


def test_the_chart_library_is_untouched_and_its_version_noted() -> None:
    folder = files("penstock") / "web" / "vendor" / "uplot"
    found = re.search(r"^uPlot (\S+), MIT", (folder / "README.md").read_text())
    assert found is not None
    for name, digest in UPLOT[found[1]].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    assert f"(v{found[1]})" in (folder / "uPlot.esm.js").read_text()[:400]


def test_only_kinds_that_a_browser_needs_are_served() -> None:
    served = assets()
    assert {"index.html", "style.css", "icon.svg", "js/main.js", "vendor/uplot/uPlot.esm.js"} <= set(served)
    assert not any(path.endswith(("LICENSE", ".md", ".ts", ".json")) for path in served)
    assert all(asset.type in TYPES.values() for asset in served.values())
    assert len({asset.etag for asset in served.values()}) == len(served)
