"""Draw nbs/images/network.svg, the front page's picture: the network with its measured shapes."""
from __future__ import annotations

from pathlib import Path

import matplotlib

from qtseg.view.figures import network_overview

TARGET = Path(__file__).resolve().parent.parent / "nbs" / "images" / "network.svg"

if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "qtseg"  # the same file every time
    TARGET.parent.mkdir(exist_ok=True)
    network_overview().savefig(TARGET, facecolor="white", metadata={"Date": None})
    print(f"wrote {TARGET}")
