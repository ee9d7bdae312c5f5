"""Takes the picture of a run's page that the README shows.

    trimtab finetune examples/quickstart.yaml
    python docs/pictures.py runs/quickstart/report.html      writes docs/assets/report.png

It needs a chromium or a chrome on the PATH, and Pillow, which matplotlib brings.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ASSETS = Path(__file__).resolve().parent / "assets"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH, HEIGHT = 1100, 1000


def take(page: Path, picture: Path) -> None:
    """The first screen of ``page``, in 128 colours, which a page of text and a few curves does not exceed by much."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"no browser was found: {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        size = f"--window-size={WIDTH},{HEIGHT}"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", size, f"--screenshot={shot}"]
        subprocess.run([browser, *options, page.resolve().as_uri()], check=True, capture_output=True)
        Image.open(shot).convert("RGB").quantize(128).save(picture, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    take(Path(sys.argv[1]), ASSETS / "report.png")
